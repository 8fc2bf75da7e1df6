"""Hugging Face models and checkpoints: patching, verifying, explaining, loading, converting.

Importing this does not import transformers; what needs it imports it at its first use.
"""

from fastlm.hf.explain import Coverage, coverage, explain_model
from fastlm.hf.patch import Patch, patch, unpatch
from fastlm.hf.verify import Report, verify

__all__ = [
    "Coverage",
    "Patch",
    "Report",
    "coverage",
    "explain_model",
    "patch",
    "unpatch",
    "verify",
]
