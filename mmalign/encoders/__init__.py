"""Encoders: one protocol, one loader, a file per source of weights."""

from .encoder import Encoder
from .folder import write_weights
from .joined import JoinedEncoder
from .registry import DEFAULT_SPEC, load_encoder, register_source

__all__ = ["DEFAULT_SPEC", "Encoder", "JoinedEncoder", "load_encoder", "register_source", "write_weights"]
