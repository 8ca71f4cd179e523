"""The frozen text encoder of a text-to-image model, by name: it reads captions once, and no checkpoint copies it.

A checkpoint holds its source and the sha256 of its weights, so that other weights under the same name are refused.
Left out: training it, several encoders, and what a hub calls a revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from sqat.checkpoint.manifest import WEIGHTS, file_digest
from sqat.compat import quiet_transformers
from sqat.errors import SqatError, first_line
from sqat.models.sources import LOADING, resolve_source

CHUNK = 64


class Read(NamedTuple):
    """Captions as a model reads them.

    Attributes:
        states: last hidden states [N,T,E] float32, 0 where the mask [N,T] is.
        cut: whether each caption had more tokens.
    """

    states: Tensor
    mask: Tensor
    cut: list[bool]


@dataclass(frozen=True)
class Captions:
    """A frozen text encoder, by name.

    Attributes:
        source: ``package:NAME/FOLDER``, a folder, or a hub name.
        tokens: that a caption is cut or padded to.
        sha256: of its weights; empty for a hub name.
    """

    source: str
    tokens: int
    sha256: str

    @classmethod
    def of(cls, source: str, tokens: int) -> Captions:
        """Name the encoder that a source holds now."""
        weights = Path(resolve_source(source, Path())) / WEIGHTS
        return cls(source, tokens, file_digest(weights) if weights.is_file() else "")

    @property
    def folder(self) -> str:
        """Where it lies, or its hub name.

        Raises:
            SqatError: its weights are not those that the model learned with.
        """
        folder = resolve_source(self.source, Path())
        if self.sha256 and (found := file_digest(Path(folder) / WEIGHTS)) != self.sha256:
            problem = f"the text encoder {self.source!r} has weights of sha256 {found}"
            raise SqatError(f"{problem}, the model learned with {self.sha256}", "install the version it learned with")
        return folder

    @quiet_transformers()
    def read(self, texts: Sequence[str]) -> Read:
        """What the encoder makes of captions.

        Raises:
            SqatError: the encoder cannot be loaded.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                self.folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            ).eval()
        except LOADING as error:
            problem = f"the text encoder {self.source!r} cannot be loaded: {first_line(error)}"
            raise SqatError(problem, "check model.text_encoder") from error
        cut = [len(ids) > self.tokens for ids in tokenizer(list(texts))["input_ids"]]
        known = {"padding": "max_length", "truncation": True, "max_length": self.tokens}
        tokens = tokenizer(list(texts), return_tensors="pt", **known)
        ids, mask = tokens["input_ids"].split(CHUNK), tokens["attention_mask"].split(CHUNK)
        with torch.no_grad():
            states = [model(input_ids=i, attention_mask=m).last_hidden_state for i, m in zip(ids, mask, strict=True)]
        kept = tokens["attention_mask"].float()
        return Read(torch.cat(states) * kept[..., None], kept, cut)
