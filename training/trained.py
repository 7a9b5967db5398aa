"""The former name of ``training.loading``, for one release."""

import warnings

from training.loading import load_flow, load_trained

__all__ = ["load_flow", "load_trained"]
warnings.warn("training.trained is now training.loading", FutureWarning, stacklevel=2)
