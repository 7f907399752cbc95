"""Words to prefix ids: a small caption vocabulary, saved beside the model that was trained with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vgen.errors import VgenError, first_line, nearest
from vgen.exports import Exported
from vgen.files import atomic_path
from vgen.models.conditions.base import Conditions
from vgen.models.conditions.class_names import FILE as NAMES
from vgen.models.conditions.class_names import class_number, load_names, save_names
from vgen.samplers.types import Condition

PAD, START, UNKNOWN, FIRST_CLASS = "<pad>", "<start>", "<unknown>", "<class-{}>"
FILE = "vocabulary.json"


class Vocabulary(Conditions):
    """A word-level tokenizer with class tokens: prefixes are `words <start>`, `<class-k> <start>`, or `<start>` alone (null).

    The position of `<start>` gives the offset of the visual positions, so the null prefix begins at 0 as in Lumos-1.
    """

    takes_labels = True

    def __init__(self, tokenizer: Tokenizer, class_names: Sequence[str] = ()):
        """class_names: by label; empty: not known."""
        self.tokenizer, self.class_names = tokenizer, tuple(class_names)
        self.pad, self.start, self.unknown = (tokenizer.token_to_id(t) for t in (PAD, START, UNKNOWN))
        ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(FIRST_CLASS.format(r"\d+"), token)]
        self.classes = len(ids)
        self.first_class = min(ids) if ids else None

    @classmethod
    def build(cls, captions: Iterable[str], classes: int = 0, class_names: Sequence[str] = ()) -> Vocabulary:
        """Every word and punctuation mark of `captions` (lower-cased), most frequent first, and `classes` class tokens.

        Captions may be empty, all of them too: then the one prefix there is is `<start>`.
        """
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [PAD, START, UNKNOWN, *(FIRST_CLASS.format(i) for i in range(classes))]
        tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
        return cls(tokenizer, class_names)

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        """Reads `vocabulary.json` of a model folder; `class_names` are left to the caller."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise VgenError(f"{path} is missing: a model folder holds its caption vocabulary beside the weights")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # what tokenizers raises has no type of its own
            raise VgenError(
                f"{path} is not a vocabulary ({first_line(error)}); copy or download the folder again"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes `vocabulary.json` into `folder`."""
        with atomic_path(Path(folder) / FILE) as temporary:
            temporary.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def words(self) -> list[str]:
        """All words a prompt may use."""
        return sorted(token for token in self.tokenizer.get_vocab() if not token.startswith("<"))

    @property
    def unconditional(self) -> bool:
        """Whether there is nothing to choose from: no word (no picture had a caption) and no class."""
        return not self.words and not self.classes

    def encode(self, text: str, strict: bool = True) -> list[int]:
        """Ids of a caption's words; none of an empty caption, which asks for nothing. strict: an unknown word is a VgenError, else
        it becomes `<unknown>`."""
        encoding = self.tokenizer.encode(text)
        if strict:
            for index, (begin, end) in zip(encoding.ids, encoding.offsets):
                if index == self.unknown:
                    word = text[begin:end].lower()
                    if not self.words:
                        raise VgenError(
                            f"this model was trained without captions and knows no words, got the prompt {text!r}; leave the prompt out"
                        )
                    raise VgenError(
                        f"the prompt {text!r} has the word {word!r}, which this model was not trained with"
                        f"{nearest(word, self.words)}; `vgen sample --list-words` prints the words it knows"
                    )
        return encoding.ids

    def class_number(self, label: int | str) -> int:
        """The number of a class that is given by number or by name. VgenError for a class that is not there."""
        return class_number(label, self.classes, self.class_names)

    def class_id(self, label: int | str) -> int:
        """The prefix id of a class, by number or name."""
        number = self.class_number(label)
        return self.first_class + number

    def shortened(self, text: str, limit: int) -> str:
        """The caption as far as a prefix of `limit` ids, `<start>` included, holds it (0: all)."""
        words = self.tokenizer.encode(text).offsets
        return text if not limit or len(words) < limit else text[: words[limit - 2][1] if limit > 1 else 0]

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = True) -> Condition:
        """One `words <start>` prefix a caption; limit: longest prefix of the model, `<start>` included (0: any length)."""
        rows = []
        for caption in captions:
            ids = self.encode(caption, strict)
            if limit and len(ids) + 1 > limit:
                if strict:
                    raise VgenError(
                        f"the prompt {caption!r} has {len(ids)} words, this model takes at most {limit - 1}; shorten it"
                    )
                ids = ids[: limit - 1]
            rows.append([*ids, self.start])
        return self.condition(rows)

    def labels(self, labels: Sequence[int | str], strict: bool = True) -> Condition:
        """One `<class-k> <start>` prefix a class, by number or name; not strict: `<start>` alone for a number below 0."""
        rows = []
        for label in labels:
            nothing = not strict and not isinstance(label, str) and label < 0
            rows.append([self.start] if nothing else [self.class_id(label), self.start])
        return self.condition(rows)

    def named(self, class_names: Sequence[str]) -> Vocabulary:
        """The same vocabulary with names of its classes."""
        return Vocabulary(self.tokenizer, class_names)

    def null(self, batch: int) -> Condition:
        """The empty prefix `<start>`: the unconditional row of classifier-free guidance."""
        return self.condition([[self.start]] * batch)

    def drop(self, condition: Condition, share: float, uniform: Tensor | None = None) -> Condition:
        """Training: every row becomes the empty prefix with probability `share`. uniform: [B] draws."""
        uniform = torch.rand(len(condition.ids), device=condition.ids.device) if uniform is None else uniform
        dropped = (uniform < share)[:, None]
        first = torch.arange(condition.ids.shape[1], device=condition.ids.device) == 0
        empty = torch.where(first, self.start, self.pad)
        ids, mask = torch.where(dropped, empty, condition.ids), torch.where(dropped, first, condition.mask)
        return Condition(ids, mask, condition.extras)

    def check(self, condition: Condition) -> None:
        """Raises VgenError unless every row has a word or `<start>`, all of this vocabulary. Synchronises: once a run."""
        ids, mask = condition.ids, condition.mask
        if ids.dim() != 2 or mask.shape != ids.shape or not bool(mask.any(dim=1).all()):
            raise VgenError(f"this model takes word ids [B, P], at least one a row, got {list(ids.shape)}")
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= len(self):
            raise VgenError(f"word ids of this model are 0 to {len(self) - 1}, got {low} to {high}")

    def condition(self, rows: Sequence[Sequence[int]]) -> Condition:
        """Right-padded ids [B, P] and mask [B, P] of ragged prefixes."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        for row, values in zip(ids, rows):
            row[: len(values)] = torch.tensor(values)
        lengths = torch.tensor([len(values) for values in rows])
        return Condition(ids, torch.arange(length) < lengths[:, None])


class SavesVocabulary(Exported):
    """For diffusers models whose `vocabulary` may be a `Vocabulary` or know the names of its classes: saved and loaded beside the weights.

    A model with a config entry `conditioning` has a `Vocabulary` when that is "words", a model without the entry always. It may stand
    before or behind `Generator` among the bases.
    """

    def save_beside(self, folder: Path) -> None:
        """`vocabulary.json` and `classes.json`."""
        if isinstance(self.vocabulary, Vocabulary):
            self.vocabulary.save(folder)
        if self.vocabulary is not None and self.vocabulary.class_names:
            save_names(folder, self.vocabulary.class_names)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As diffusers, plus the vocabulary and the class names saved beside the weights (a folder, or a hub repository)."""
        model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kind, subfolder = model.config.get("conditioning", "words"), kwargs.get("subfolder")
        if kind == "words":
            path = _beside(pretrained_model_name_or_path, FILE, subfolder)
            model.vocabulary = Vocabulary.load(path.parent)
        if model.vocabulary is not None and model.vocabulary.takes_labels:
            path = _beside(pretrained_model_name_or_path, NAMES, subfolder, optional=True)
            model.vocabulary = model.vocabulary.named(load_names(path, model.vocabulary.classes))
        return model


def _beside(place: str | Path, name: str, subfolder: str | None, optional: bool = False) -> Path | None:
    """A file of a model folder, or of a hub repository; None for an optional one that the repository does not have."""
    folder = Path(place) / (subfolder or "")
    if folder.is_dir():
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(place), name, subfolder=subfolder))
    except EntryNotFoundError:
        if optional:
            return None
        raise
