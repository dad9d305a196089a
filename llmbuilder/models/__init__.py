"""Models: the native GPT, Hugging Face folders and GGUF files, loaded, saved and run in one way."""

from .chat import chat_prompt
from .digest import weights_digest
from .dtypes import computes_bf16
from .generate import end_ids, generate
from .gpt import GPT, GPTConfig
from .load import load_model
from .save import replacing, save_model
from .structure import blocks, context_length, embeddings, head, tie_groups
from .tokenizer import byte_tokenizer, train_tokenizer

__all__ = [
    "GPT",
    "GPTConfig",
    "blocks",
    "byte_tokenizer",
    "chat_prompt",
    "computes_bf16",
    "context_length",
    "embeddings",
    "end_ids",
    "generate",
    "head",
    "load_model",
    "replacing",
    "save_model",
    "tie_groups",
    "train_tokenizer",
    "weights_digest",
]
