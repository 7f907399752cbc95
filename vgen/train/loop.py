"""The training loop: any system, 1..n processes, exact resume.

What makes resume exact: batches are addressed by their number, every random draw is seeded by (seed, step, process), schedules are functions
of the step, and a checkpoint holds weights, averages and optimizer states. Nothing else carries over from one step to the next.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.files import atomic_folder, atomic_path, check_folder, sole_user
from vgen.settings import merge, read_yaml, save_config, to_dict, to_yaml
from vgen.train.checkpoint import (
    Checkpoint,
    Trainee,
    checkpoints,
    damaged,
    load,
    prune,
    remove_leftovers,
    save,
    set_aside,
    whole,
    whole_weights,
)
from vgen.train.config import (
    TrainConfig,
    check_common,
    check_run_folder,
    differences,
    read_layers,
    todays_words,
)
from vgen.train.log import RunLog
from vgen.train.optim import Average, learning_rate, make_optimizers
from vgen.train.precision import MIXED, SLOWER, bf16_reason, has_bf16, resolved
from vgen.train.seeds import derived_seed, kept_draws, step_generator
from vgen.train.system import SYSTEMS, Loss, System, build_system, load_config, system_module


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended. steps: optimizer steps done in the run's life; finished: all of them; model: exported folder.

    exit_code: what a shell is told, so that `vgen train … && vgen tokenize …` stops with it: 128 + the signal (130: Ctrl-C, 143: SIGTERM),
    124 for the time limit (as timeout(1)), else 0.
    """

    folder: Path
    steps: int
    finished: bool
    seconds: float
    figures: dict[str, float]
    model: Path | None
    exit_code: int


class Trainer:
    """A system with everything around it, for one process."""

    def __init__(self, config: TrainConfig):
        if config.threads:
            torch.set_num_threads(config.threads)
        AcceleratorState._reset_state()  # one process may train several systems in turn (notebooks, tests)
        self.config = config = resolved(config, _processes().device)
        self.folder = Path(config.out)
        # find_unused_parameters stays off: an objective must use its whole network. Buffers follow the main process.
        self.accelerator = Accelerator(
            mixed_precision=MIXED[config.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=True)],
        )
        self.main = self.accelerator.is_main_process
        torch.manual_seed(derived_seed(config.seed, "initialisation"))
        self.system: System = build_system(config, self.accelerator.device)
        if self.accelerator.is_fsdp2 and len(self.system.networks) > 1:
            names = ", ".join(self.system.networks)
            raise VgenError(
                f"FSDP2 shards one network, {config.system} trains {names}; launch it with plain data parallelism"
            )
        self.trainees = {name: self._prepare(name, network) for name, network in self.system.networks.items()}
        self.system.networks = {name: trainee.network for name, trainee in self.trainees.items()}
        self.leading = next(iter(self.trainees))  # its objective is "the loss" in logs
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.data_digests = dict(self.system.data_digests())
        self.watch = Watch(config.precision)
        self.figures: dict[str, float] = {}

    def _prepare(self, name: str, network: nn.Module) -> Trainee:
        if self.config.channels_last:
            network = network.to(memory_format=torch.channels_last)
        optimizers = make_optimizers(network, self.system.optimizers[name])
        network, *prepared = self.accelerator.prepare(network, *optimizers)
        averaged = self.config.ema_decay and name in self.system.averaged
        average = Average(self.accelerator.unwrap_model(network), self.config.ema_decay) if averaged else None
        return Trainee(network, [wrapper.optimizer for wrapper in prepared], average)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's state back."""
        load(self.accelerator, checkpoint, self.trainees)
        self.figures = {key: v for key, v in checkpoint.state.items() if key not in ("step", "score", "made_with")}

    def changed_data(self, checkpoint: Checkpoint) -> list[str]:
        """What the run learns from, in words, where it is no longer what it was when the checkpoint was made."""
        before = checkpoint.state.get("made_with", {}).get("data", {})  # checkpoints of the past do not say
        return [name for name, digest in self.data_digests.items() if before.get(name, digest) != digest]

    def save(self, step: int, score: float | None) -> Path:
        """Writes a checkpoint after `step` steps and drops old ones."""
        made_with = {"processes": self.world, "device": self.accelerator.device.type, "data": self.data_digests}
        state = {"score": score, **self.figures, "made_with": made_with}
        path = save(self.accelerator, self.folder / "checkpoints", step, self.trainees, state)
        if self.main:
            prune(self.folder / "checkpoints", self.config.keep, self.system.score[1] if self.system.score else 0)
        return path

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the averaged model with `save_pretrained`."""
        with self.averaged_weights():
            # On a CPU these are the network's own tensors: they are averaged inside this block only.
            weights = {name: whole_weights(self.accelerator, trainee) for name, trainee in self.trainees.items()}
            if self.main:
                with atomic_folder(folder) as temporary:
                    self.system.export(temporary, weights, dtype)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Averaged weights in place, networks in evaluation mode, no gradients; afterwards all is as it was: looking changes nothing."""
        modes = {module: module.training for t in self.trainees.values() for module in t.network.modules()}
        try:
            with ExitStack() as stack:
                stack.enter_context(kept_draws(self.accelerator.device))
                for trainee in self.trainees.values():
                    trainee.network.eval()
                    if trainee.average:
                        stack.enter_context(trainee.average.applied())
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.accelerator.autocast())
                yield
        finally:
            for module, training in modes.items():  # not network.train(): frozen parts stay in evaluation mode
                module.training = training

    def evaluate(self, step: int, log: RunLog) -> float | None:
        """Held-out figures after `step` steps, logged; returns the score that ranks checkpoints."""
        with self.averaged_weights():
            values = self.system.evaluate(step)
        if not values:
            return None
        log.figures(step, values, kind="held_out")
        self.figures = {**self.figures, **values}
        return values[self.system.score[0]] if self.system.score else None

    def preview(self, step: int) -> str | None:
        """Writes `previews/step_*.png`; what went wrong, if it did: latents of a young model may be beyond what the tokenizer decodes.

        Not under FSDP2: a sharded network works through its forward alone, sampling does not.
        """
        if self.accelerator.is_fsdp2:
            return None
        with self.averaged_weights():
            torch.manual_seed(derived_seed(self.config.seed, "preview"))
            try:
                picture = self.system.preview(step)
            except VgenError as error:
                return str(error)
        if picture is not None and self.main:
            with atomic_path(self.folder / "previews" / f"step_{step:08d}.png") as temporary:
                picture.save(temporary)
        return None

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        """Optimizer step number `step` (0-based) of every network, over `accumulate` batches."""
        config, logs = self.config, {}
        for name, trainee in self.trainees.items():
            rate = learning_rate(self.system.optimizers[name], step, config.steps)
            for optimizer in trainee.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
        for micro in range(config.accumulate):
            batch = self._to_device(next(batches))
            generator = step_generator(config.seed, step, micro, self.rank, device=self.accelerator.device)
            last = micro == config.accumulate - 1
            with ExitStack() as stack:
                if not last:
                    for trainee in self.trainees.values():
                        stack.enter_context(self.accelerator.no_sync(trainee.network))
                for loss in self.system.losses(batch, step, generator):
                    self.accelerator.backward(loss.value / config.accumulate)
                    key = "loss" if loss.network == self.leading else f"loss_{loss.network}"
                    _accumulate(logs, loss, key, config.accumulate)
                    if last:
                        logs[f"grad_norm_{loss.network}"] = self._update(loss.network, step)
        self.watch.add(step, logs)

    def _update(self, name: str, step: int) -> Tensor:
        trainee, clip = self.trainees[name], self.system.optimizers[name].clip
        parameters = [p for p in trainee.network.parameters() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(parameters, clip or math.inf)
        for optimizer in trainee.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if trainee.average:
            trainee.average.update(step)
        return whole(torch.as_tensor(norm))

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        moved = {}
        for key, value in batch.items():
            if isinstance(value, Tensor):
                value = value.to(self.accelerator.device, non_blocking=True)
                value = value.contiguous(memory_format=layout) if value.dim() == 4 else value
            moved[key] = value
        return moved


class Watch:
    """Figures of the steps since the last look, left on the device: one synchronisation per look, not per step."""

    def __init__(self, precision: str) -> None:
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.advice = "Lower the learning rate or lengthen the warm-up"
        if precision != "fp32":
            self.advice += ", or use precision=fp32"

    def add(self, step: int, logs: dict[str, Tensor]) -> None:
        """Remembers the figures of step number `step`."""
        self.pending.append((step, logs))

    def collect(self, last_checkpoint: Path | None) -> dict[str, float]:
        """Means over the pending steps. Raises VgenError at the first loss or gradient norm that is not finite."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for step, logs in self.pending:
            values = torch.stack([value.float().reshape(()) for value in logs.values()]).tolist()
            for key, value in zip(logs, values):
                if not math.isfinite(value):
                    rescue = (
                        f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
                    )
                    raise VgenError(
                        f"{key} became {value} at step {step + 1} and training stopped; {rescue}. {self.advice}"
                    )
                sums[key] = sums.get(key, 0.0) + value
                counts[key] = counts.get(key, 0) + 1
        self.pending.clear()
        return {key: total / counts[key] for key, total in sums.items()}


class StopRequest:
    """Turns SIGINT and SIGTERM into "finish this step, save, stop"; a second signal acts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def train(config: TrainConfig, allow_changes: bool = False) -> Summary:
    """Trains, or continues, the run in `config.out` until `config.steps` steps are done.

    config: from `load_config`. allow_changes: continue a run although settings that change its weights differ.
    Raises VgenError for a run folder of another config, a broken checkpoint, or a loss that is not finite.
    """
    with _alone(Path(config.out)):
        return _train(config, allow_changes)


def _train(config: TrainConfig, allow_changes: bool) -> Summary:
    started, asked = time.monotonic(), config
    config = resolved(config, _processes().device)
    newest = _resume_point(config, allow_changes)
    trainer = Trainer(config)
    system, folder, main = trainer.system, trainer.folder, trainer.main
    if newest:
        if (changed := trainer.changed_data(newest)) and not allow_changes:
            raise VgenError(
                f"{folder} did its first {newest.step} steps on other data: {', '.join(changed)} changed since then; put the data "
                "back, choose another out= folder, or continue it with --allow-changes"
            )
        trainer.restore(newest)
    first = newest.step if newest else 0
    log = RunLog(folder, first, config.steps, system.items, config.tensorboard, main)
    log.say(_opening(trainer, first, asked.precision))
    for warning in _warnings(trainer, newest, asked.precision):
        log.say(f"warning: {warning}")
    if main:
        for path, why in damaged(folder / "checkpoints").items():
            log.say(f"warning: {path} is damaged ({why}) and is not used; it is now {set_aside(path).name}")
        remove_leftovers(folder / "checkpoints")
        save_config(config, folder / "config.yaml")
    last_checkpoint, saved_at, looked_at = newest.folder if newest else None, time.monotonic(), time.monotonic()
    looked_step, done, reason, exit_code = first, first, None, 0
    batches = system.batches(first * config.accumulate, trainer.rank, trainer.world)

    with StopRequest() as request:
        while done < config.steps and not reason:
            trainer.step(done, batches)
            averages = {name: t.average.values for name, t in trainer.trainees.items() if t.average}
            generator = step_generator(config.seed, done, "after", device=trainer.accelerator.device)
            for message in system.after_step(done, generator, averages):
                log.say(f"step {done + 1}: {message}")
            done += 1
            log.advance()

            over = config.time_limit_minutes and time.monotonic() - started > 60 * config.time_limit_minutes
            minutes = (time.monotonic() - saved_at) / 60
            due = config.checkpoint_minutes and minutes >= config.checkpoint_minutes
            number, over, due = _agree(trainer.accelerator, request.signal or 0, bool(over), bool(due))
            if number or over:
                reason = signal.Signals(number).name if number else "the time limit"
                exit_code = 128 + number if number else 124
            ends = done == config.steps or reason
            evaluating = bool(config.evaluate_every) and (_due(config.evaluate_every, done) or done == config.steps)
            previewing = bool(config.preview_every) and (_due(config.preview_every, done) or done == config.steps)
            # An evaluated step is saved, so that the best checkpoint can be kept.
            saving = ends or due or _due(config.checkpoint_every, done) or evaluating
            if not (_due(config.log_every, done) or saving or previewing):
                continue

            values = trainer.watch.collect(last_checkpoint)
            rows = (done - looked_step) * config.batch_size * config.accumulate * trainer.world
            values[f"{system.items}_per_second"] = rows / (time.monotonic() - looked_at)
            values["lr"] = learning_rate(system.optimizers[trainer.leading], done - 1, config.steps)
            log.figures(done, values)
            trainer.figures = {**trainer.figures, "loss": values["loss"]}
            score = trainer.evaluate(done, log) if evaluating else None
            if previewing and (trouble := trainer.preview(done)) is not None:
                log.say(f"step {done}: no preview ({trouble})")
            if saving:
                last_checkpoint, saved_at = trainer.save(done, score), time.monotonic()
                log.say(f"step {done}: saved {last_checkpoint}")
            looked_step, looked_at = done, time.monotonic()

    log.close()
    finished = done == config.steps
    exit_code = 0 if finished and exit_code == 124 else exit_code
    model = folder / "model" if finished else None
    if model and (first < config.steps or not model.exists()):
        trainer.export(model)
    seconds = time.monotonic() - started
    if main:
        print(_closing(trainer, done, seconds, reason, model), file=sys.stderr)
    trainer.accelerator.end_training()
    return Summary(folder, done, finished, seconds, trainer.figures, model, exit_code)


def describe(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """A config, checked and resolved, as YAML, and the parameter counts; nothing is trained or written.

    What it names is opened where it is there. Where data or weights are not there yet, the networks are made of the config alone and
    the last line says what was not looked at.
    """
    name, *layers = read_layers(path, overrides)
    module = system_module(name)
    sketched = merge(module.Config, *layers)
    check_common(sketched)
    absent = module.missing(sketched) if hasattr(module, "sketch") else []
    if absent:
        config, networks = sketched, module.sketch(sketched)
        end = [f"# not there yet, so not checked: {', '.join(absent)}"]
    else:
        config = resolved(load_config(path, overrides), _processes().device)
        networks, end = build_system(config, torch.device("cpu")).networks, []
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    said = [f"# {name}: {count:,} parameters" for name, count in counts.items()]
    return "\n".join([to_yaml(config).rstrip(), *said, *end])


def export_checkpoint(config: TrainConfig, which: str, target: Path, dtype: str = "float32") -> Checkpoint:
    """Writes the averaged model of a checkpoint of the run `config.out` to `target`; the run itself is left alone.

    which: "last", "best", or a step number; dtype: float32, float16 or bfloat16, for the exported weights.
    """
    check_folder(target)
    found = checkpoints(Path(config.out) / "checkpoints")
    if not found:
        raise VgenError(f"{config.out} has no checkpoint yet; train first: vgen train CONFIG")
    trainer = Trainer(config)
    by_name = {str(checkpoint.step): checkpoint for checkpoint in found} | {"last": found[-1]}
    scored = [checkpoint for checkpoint in found if checkpoint.state.get("score") is not None]
    if trainer.system.score and scored:
        by_name["best"] = max(scored, key=lambda checkpoint: trainer.system.score[1] * checkpoint.state["score"])
    if which not in by_name:
        raise VgenError(f"{trainer.folder} has no checkpoint {which!r}; it has {', '.join(by_name)}")
    trainer.restore(by_name[which])
    trainer.export(target, getattr(torch, dtype))
    return by_name[which]


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _processes() -> PartialState:
    """The processes of this training and the device of this one, as the Accelerator will see them."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _agree(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest that any process has of every value: clocks and signals differ, what the processes do then must not."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor([values], device=accelerator.device)
    return tuple(accelerator.gather(mine).amax(dim=0).tolist())


def _accumulate(logs: dict[str, Tensor], loss: Loss, key: str, parts: int) -> None:
    for name, value in {key: loss.value, **loss.logs}.items():
        value = torch.as_tensor(value).detach() / parts
        logs[name] = logs[name] + value if name in logs else value


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other training can use `folder`; the processes of one training share the main one's lock."""
    check_run_folder(folder)
    state, trouble = _processes(), None
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(sole_user(folder, "training"))
            except VgenError as error:
                trouble = error
        refused = [trouble is not None]
        if state.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0]:
            raise trouble or SystemExit(2)  # one process says it
        yield


def _resume_point(config: TrainConfig, allow_changes: bool) -> Checkpoint | None:
    """The checkpoint that training continues from, None for a new run. Raises VgenError when it cannot, or with other results."""
    folder = Path(config.out)
    found, broken = checkpoints(folder / "checkpoints"), damaged(folder / "checkpoints")
    if broken and not found:
        path, why = next(iter(broken.items()))
        raise VgenError(
            f"no checkpoint in {path.parent} can be read ({path.name}: {why}); restore one, or delete them to start anew"
        )
    newest = found[-1] if found else None
    if newest and newest.step > config.steps:
        raise VgenError(
            f"{folder} has done {newest.step} steps already, more than steps={config.steps}: there is nothing to train; "
            "raise steps, or write a model with --export FOLDER --checkpoint STEP"
        )
    _check_same_run(folder / "config.yaml", config, allow_changes)
    processes = newest.state.get("made_with", {}).get("processes", 1) if newest else 1
    if newest and "made_with" in newest.state and processes != _processes().num_processes and not allow_changes:
        raise VgenError(
            f"{folder} was trained by {processes} process(es) and now there are {_processes().num_processes}, which gives other "
            f"batches and draws; start {processes}, or continue it with --allow-changes"
        )
    return newest


def _check_same_run(path: Path, config: TrainConfig, allow_changes: bool) -> None:
    if not path.is_file():
        return
    saved = read_yaml(path)
    # Systems may have had another name: what matters is what trains them.
    if SYSTEMS.get(saved.get("system")) != SYSTEMS[config.system]:
        raise VgenError(
            f"{path.parent} holds a run of system {saved.get('system')}, not {config.system}; choose another out= folder"
        )
    if allow_changes:
        return
    # Merged onto today's defaults: a setting that vgen gained since then is no difference.
    changed = differences(to_dict(merge(type(config), todays_words(saved))), to_dict(config))
    if changed:
        raise VgenError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); choose another out= folder, delete it, "
            "or continue it with --allow-changes"
        )


def _opening(trainer: Trainer, first: int, asked: str) -> str:
    config = trainer.config
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in t.network.parameters()) / 1e6:.2f} M" for name, t in trainer.trainees.items()
    )
    rows = config.batch_size * config.accumulate * trainer.world
    start = f"continues after step {first}" if first else "starts"
    device = trainer.accelerator.device
    why = f" (auto: {bf16_reason(device)})" if asked == "auto" else ""
    threads = torch.get_num_threads()
    return (
        f"{config.system} {start} in {trainer.folder}: {sizes} parameters, {rows} {trainer.system.items} a step, "
        f"{device.type} x {trainer.world}, precision {config.precision}{why}, {threads} thread{'s' * (threads != 1)}"
    )


def _warnings(trainer: Trainer, newest: Checkpoint | None, asked: str) -> Iterator[str]:
    """What the user should know before hours go by."""
    device = trainer.accelerator.device
    if asked == "bf16" and not has_bf16(device):
        yield f"precision=bf16, but {bf16_reason(device)}: {SLOWER}; precision=auto chooses by the hardware"
    now = {"processes": trainer.world, "device": device.type}
    before = newest.state.get("made_with", now) if newest else now
    if changed := [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]:
        yield f"this run continues elsewhere ({', '.join(changed)}): its results are not those of an undisturbed run"
    if newest and (data := trainer.changed_data(newest)):
        yield f"this run continues on other data ({', '.join(data)}): its results are not those of an undisturbed run"


def _closing(trainer: Trainer, done: int, seconds: float, reason: str | None, model: Path | None) -> str:
    figures = ", ".join(f"{key} {value:.4g}" for key, value in trainer.figures.items())
    if model:
        return f"finished {done} steps ({seconds / 60:.1f} min in this call): {figures}; model in {model}"
    return f"stopped by {reason} after step {done} of {trainer.config.steps}, saved; run the same command again to continue ({figures})"
