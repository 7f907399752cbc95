"""Words to prefix ids: a small caption vocabulary, saved beside the model that was trained with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from vgen.errors import VgenError, nearest
from vgen.files import atomic_path
from vgen.samplers.types import Condition

PAD, START, UNKNOWN, FIRST_CLASS = "<pad>", "<start>", "<unknown>", "<class-{}>"
FILE = "vocabulary.json"


class Vocabulary:
    """A word-level tokenizer with class tokens: prefixes are `words <start>`, `<class-k> <start>`, or `<start>` alone (null).

    The position of `<start>` gives the offset of the visual positions, so the null prefix begins at 0 as in Lumos-1.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pad, self.start, self.unknown = (tokenizer.token_to_id(t) for t in (PAD, START, UNKNOWN))
        ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(FIRST_CLASS.format(r"\d+"), token)]
        self.classes = len(ids)
        self.first_class = min(ids) if ids else None

    @classmethod
    def build(cls, captions: Iterable[str], classes: int = 0) -> Vocabulary:
        """Every word and punctuation mark of `captions` (lower-cased), most frequent first, and `classes` class tokens."""
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [PAD, START, UNKNOWN, *(FIRST_CLASS.format(i) for i in range(classes))]
        tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
        return cls(tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        """Reads `vocabulary.json` of a model folder."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise VgenError(f"{path} is missing: a model folder holds its caption vocabulary beside the weights")
        return cls(Tokenizer.from_file(str(path)))

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

    def encode(self, text: str, strict: bool = True) -> list[int]:
        """Ids of a caption's words. strict: an unknown word is a VgenError, else it becomes `<unknown>`."""
        encoding = self.tokenizer.encode(text)
        if strict:
            for index, (begin, end) in zip(encoding.ids, encoding.offsets):
                if index == self.unknown:
                    word = text[begin:end].lower()
                    raise VgenError(
                        f"the prompt {text!r} has the word {word!r}, which this model was not trained with"
                        f"{nearest(word, self.words)}; `vgen sample --list-words` prints the words it knows"
                    )
            if not encoding.ids:
                raise VgenError(f"the prompt {text!r} has no words; write what the picture shows, e.g. 'red apple'")
        return encoding.ids

    def class_id(self, label: int) -> int:
        """The prefix id of a class label."""
        if self.first_class is None:
            raise VgenError("this model was trained without classes; use a prompt")
        if not 0 <= label < self.classes:
            raise VgenError(f"class labels of this model are 0 to {self.classes - 1}, got {label}")
        return self.first_class + label

    def captions(self, captions: Sequence[str], limit: int, strict: bool = True) -> Condition:
        """One `words <start>` prefix a caption; `limit`: longest prefix the model was trained with, `<start>` included."""
        rows = []
        for caption in captions:
            ids = self.encode(caption, strict)
            if len(ids) + 1 > limit:
                if strict:
                    raise VgenError(
                        f"the prompt {caption!r} has {len(ids)} words, this model takes at most {limit - 1}; shorten it"
                    )
                ids = ids[: limit - 1]
            rows.append([*ids, self.start])
        return self.condition(rows)

    def labels(self, labels: Sequence[int]) -> Condition:
        """One `<class-k> <start>` prefix a label."""
        return self.condition([[self.class_id(int(label)), self.start] for label in labels])

    def null(self, batch: int) -> Condition:
        """The empty prefix `<start>`: the unconditional row of classifier-free guidance."""
        return self.condition([[self.start]] * batch)

    def condition(self, rows: Sequence[Sequence[int]]) -> Condition:
        """Right-padded ids [B, P] and mask [B, P] of ragged prefixes."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        for row, values in zip(ids, rows):
            row[: len(values)] = torch.tensor(values)
        lengths = torch.tensor([len(values) for values in rows])
        return Condition(ids, torch.arange(length) < lengths[:, None])
