"""The frozen text encoder of a text-to-image model: it reads every caption once, when rows are prepared.

A checkpoint names its source and the sha256 of its weights, and holds no copy.
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
from sqat.models.source_files import header_of
from sqat.models.sources import LOADING_ERRORS, resolve_source
from sqat.models.text import check_length, check_tokens

CHUNK = 64


class EncodedCaptions(NamedTuple):
    """Captions as states of tokens.

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
        """Return the encoder that a source holds now."""
        weights = Path(resolve_source(source, Path())) / WEIGHTS
        return cls(source, tokens, file_digest(weights) if weights.is_file() else "")

    @property
    def folder(self) -> str:
        """Its folder or hub name.

        Raises:
            SqatError: its weights are not those that the model learned with.
        """
        folder = resolve_source(self.source, Path())
        if self.sha256 and (found := file_digest(Path(folder) / WEIGHTS)) != self.sha256:
            problem = f"the text encoder {self.source!r} has weights of sha256 {found}"
            raise SqatError(
                f"{problem}, the model learned with {self.sha256}",
                "install the version it learned with",
                code="model-mismatch",
            )
        return folder

    @quiet_transformers()
    def read(self, texts: Sequence[str]) -> EncodedCaptions:
        """Encode captions.

        Raises:
            SqatError: the encoder cannot be loaded.
        """
        header_of(self.folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                self.folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            ).eval()
        except LOADING_ERRORS as error:
            problem = f"the text encoder {self.source!r} cannot be loaded: {first_line(error)}"
            raise SqatError(problem, "check model.text_encoder", code="unsupported-model") from error
        check_tokens(model, tokenizer, self.source)
        check_length(model, self.tokens)
        cut = [len(ids) > self.tokens for ids in tokenizer(list(texts))["input_ids"]]
        options = {"padding": "max_length", "truncation": True, "max_length": self.tokens}
        tokens = tokenizer(list(texts), return_tensors="pt", **options)
        chunks = zip(tokens["input_ids"].split(CHUNK), tokens["attention_mask"].split(CHUNK), strict=True)
        with torch.no_grad():
            states = [model(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask in chunks]
        mask = tokens["attention_mask"].float()
        return EncodedCaptions(torch.cat(states) * mask[..., None], mask, cut)
