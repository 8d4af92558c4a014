"""npser: speech emotion recognition by convolutional and recurrent networks, from scratch in Python.

The path of the data reads top to bottom: corpus (wav files) -> features (frames, windows) -> models (layers) ->
trainer and crossval (epochs, folds, votes) -> metrics and report (tables). The numerical work is done by the
top-level package `kernels`.
"""

import kernels

if not hasattr(kernels, "RUNGS"):
    raise ImportError(
        f"npser needs its own package `kernels`, but Python found another one at {kernels.__file__}: "
        "uninstall that package or put npser's folder first on PYTHONPATH"
    )

__version__ = "0.1.0"
