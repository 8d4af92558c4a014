"""Short-time Fourier magnitudes on the CPU: the transform itself is SciPy's, in float32 and over all frames at once.

Networks read what it gives many times, so this is not a hot spot.
"""

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from kernels import reference
from kernels.cpu.tools import Array, as_float32


def stft_magnitude_forward(x: Array, frame: int, hop: int) -> tuple[Array, NDArray[np.complex64]]:
    """See `kernels.reference.stft_magnitude_forward`."""
    (x,) = as_float32(x=x)
    frames = sliding_window_view(x, frame)[::hop] * reference.hann(frame).astype(np.float32)
    spectrum = scipy.fft.rfft(frames, axis=1)
    return np.abs(spectrum), spectrum


def stft_magnitude_backward(dy: Array, spectrum: NDArray[np.complex64], frame: int, hop: int, samples: int) -> Array:
    """See `kernels.reference.stft_magnitude_backward`, which computes it: no training needs it to be fast."""
    (dy,) = as_float32(dy=dy)
    return reference.stft_magnitude_backward(dy, spectrum, frame, hop, samples)
