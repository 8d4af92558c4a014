"""Every operation in plain NumPy: what it means, forward and backward, in any float type.

Written to be read, and to be trusted: the gradient checks in `tests/test_gradients.py` differentiate these functions
numerically in float64, and the faster rungs are tested against them. Shape letters are those of `kernels`.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

DEAD = 4
"""Argmax code of a pooling cell in which no pixel passed the ReLU: it passes no gradient on."""


# --- convolution, ReLU, max-pooling ------------------------------------------------------------------------------


def conv3x3_forward(x: Array, w: Array, b: Array) -> Array:
    """3x3 convolution (cross-correlation, as in every framework), stride 1, zero padding 1.

        y[n, t, f, o] = b[o] + sum over i, j, c of  x[n, t+i-1, f+j-1, c] * w[i, j, c, o],   i, j = 0..2

    x (B, T, F, C), w (3, 3, C, O), b (O,) -> y (B, T, F, O).
    """
    T, F = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((*x.shape[:3], w.shape[3]), x.dtype) + b
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + T, j : j + F] @ w[i, j]
    return y


def conv3x3_backward(dy: Array, x: Array, w: Array, need_dx: bool = True) -> tuple[Array | None, Array, Array]:
    """Gradients of `conv3x3_forward`: (dx or None, dw, db).

        dx[n, t, f, c]  = sum over i, j, o of  dy[n, t-i+1, f-j+1, o] * w[i, j, c, o]
        dw[i, j, c, o]  = sum over n, t, f of  x[n, t+i-1, f+j-1, c] * dy[n, t, f, o]
        db[o]           = sum over n, t, f of  dy[n, t, f, o]

    dx is itself a convolution: of dy with the kernel turned by 180 degrees and its channels exchanged.
    """
    T, F = x.shape[1:3]
    C, O = w.shape[2:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    dw = np.empty_like(w)
    for i in range(3):
        for j in range(3):
            dw[i, j] = padded[:, i : i + T, j : j + F].reshape(-1, C).T @ dy.reshape(-1, O)
    turned = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))
    dx = conv3x3_forward(dy, turned, np.zeros(C, dy.dtype)) if need_dx else None
    return dx, dw, dy.sum(axis=(0, 1, 2))


def relu_forward(x: Array) -> Array:
    """y = max(x, 0), element by element; not-a-number stays what it is."""
    return np.maximum(x, 0)


def relu_backward(dy: Array, y: Array) -> Array:
    """dx = dy where y > 0, else 0 (the derivative at 0 is taken as 0)."""
    return np.where(y > 0, dy, dy.dtype.type(0))


def _cells(x: Array) -> Array:
    """(B, T, F, C) -> (B, T//2, F//2, C, 4): the 2x2 cells in row order; an odd last row or column is dropped."""
    B, T, F, C = x.shape
    T, F = T // 2, F // 2
    cells = x[:, : 2 * T, : 2 * F].reshape(B, T, 2, F, 2, C)
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(B, T, F, C, 4)


def maxpool2x2_forward(x: Array) -> tuple[Array, Array]:
    """Maximum of each 2x2 cell, stride 2: (y, argmax).

    x (B, T, F, C) -> y (B, T//2, F//2, C) and argmax, uint8, the place of the maximum in row order
    (0 1 / 2 3; the first of equal ones). An odd last row or column is dropped.
    """
    cells = _cells(x)
    argmax = cells.argmax(axis=-1)
    return np.take_along_axis(cells, argmax[..., None], axis=-1)[..., 0], argmax.astype(np.uint8)


def maxpool2x2_backward(dy: Array, argmax: Array, x_shape: tuple[int, ...]) -> Array:
    """The gradient goes to the pixel that was the maximum, everything else gets 0; cells marked DEAD get nothing.

    dy, argmax (B, T//2, F//2, C) -> dx of shape x_shape (B, T, F, C).
    """
    dx = np.zeros(x_shape, dy.dtype)
    T, F = dy.shape[1:3]
    for place in range(4):
        row, column = divmod(place, 2)
        dx[:, row : 2 * T : 2, column : 2 * F : 2] = np.where(argmax == place, dy, dy.dtype.type(0))
    return dx


def conv_relu_pool_forward(x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """A whole convolution block: conv3x3 + bias, ReLU, 2x2 max-pooling: (y, argmax) (paper, Fig. 2).

    x (B, T, F, C), w (3, 3, C, O), b (O,) -> y (B, T//2, F//2, O) and argmax as in `maxpool2x2_forward`, but DEAD
    where nothing in the cell is positive.
    """
    y, argmax = maxpool2x2_forward(relu_forward(conv3x3_forward(x, w, b)))
    argmax[y <= 0] = DEAD
    return y, argmax


def conv_relu_pool_backward(
    dy: Array, argmax: Array, x: Array, w: Array, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """Gradients of `conv_relu_pool_forward`: (dx or None, dw, db).

    The argmax alone tells where the gradient goes: through the maximum of each cell, if it passed the ReLU.
    """
    B, T, F, _ = x.shape
    return conv3x3_backward(maxpool2x2_backward(dy, argmax, (B, T, F, w.shape[3])), x, w, need_dx)


# --- dense -------------------------------------------------------------------------------------------------------


def dense_forward(x: Array, w: Array, b: Array) -> Array:
    """y = x w + b.   x (N, I), w (I, J), b (J,) -> y (N, J)."""
    return x @ w + b


def dense_backward_input(dy: Array, w: Array, alive: Array | None = None) -> Array:
    """dx = dy w^T.   dy (N, J), w (I, J) -> dx (N, I).

    Where `alive` (N, I) is 0, dx is not wanted, and a rung may leave 0 there: ReLU and dropout before this layer made
    the zeros of its input, and will discard their gradient.
    """
    return dy @ w.T


def dense_backward_weights(x: Array, dy: Array) -> Array:
    """dw = x^T dy.   x (N, I), dy (N, J) -> dw (I, J)."""
    return x.T @ dy


def dense_backward_bias(dy: Array) -> Array:
    """db = sum over the rows of dy.   dy (N, J) -> db (J,)."""
    return dy.sum(axis=0)


def dense_update_weights(x: Array, dy: Array, w: Array, v: Array, lr: float, momentum: float) -> None:
    """`dense_backward_weights` followed by `sgd_update` of w and its velocity v, in place.

    One operation, because a faster rung need not write the gradient to memory: for the 134 million input weights of
    the first LSTM of tdcnn that is a third of the traffic of the update.
    """
    sgd_update(w, v, dense_backward_weights(x, dy), lr, momentum)


# --- dropout -----------------------------------------------------------------------------------------------------


def dropout_key(seed: int, layer: int, step: int) -> tuple[int, int]:
    """Two 32-bit words that select the mask of one layer in one update: splitmix64 over (seed, layer, step)."""
    mask = (1 << 64) - 1
    state = 0
    for word in (seed, layer, step):
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state & 0xFFFFFFFF, state >> 32


def dropout_threshold(rate: float) -> int:
    """The 32-bit number below which an element's hash means "dropped", for a share of `rate` dropped elements."""
    return min(round(rate * 2**32), 2**32 - 1)


def _hash32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Wellons' "lowbias32": a bijection of 32-bit words; every input bit flips each output bit half the time."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def dropout(x: Array, rate: float, key: tuple[int, int]) -> Array:
    """Inverted dropout: y = x / (1 - rate) where the mask keeps the element, else 0. Its own backward: pass dy.

    The mask is a pure function of the element's index e in row order (modulo 2^32) and the key:

        keep[e] = hash(hash(e xor key0) + key1) >= rate * 2^32

    so it is the same on every rung and with any number of threads, and backward computes it again instead of
    storing it. x of any shape; rate in [0, 1); key from `dropout_key`.
    """
    element = np.arange(x.size, dtype=np.uint32).reshape(x.shape)
    word = _hash32(_hash32(element ^ np.uint32(key[0])) + np.uint32(key[1]))
    keep = word >= np.uint32(dropout_threshold(rate))
    return np.where(keep, x * x.dtype.type(1 / (1 - rate)), x.dtype.type(0))


# --- LSTM --------------------------------------------------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written with tanh so that nothing overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def lstm_forward(z: Array, wh: Array) -> tuple[Array, Array, Array]:
    """One LSTM layer over a whole sequence (paper, section on LSTM): (h, c, gates).

    z (B, T, 4H) holds the input projections x_t wx + b of all steps (one `dense_forward`), gates in the order
    input, forget, cell, output; wh (H, 4H). Starting from h_{-1} = c_{-1} = 0, for every step t:

        i, f, o = sigmoid(z_t + h_{t-1} wh)[i, f, o]         g = tanh(z_t + h_{t-1} wh)[g]
        c_t     = f * c_{t-1} + i * g                        h_t = o * tanh(c_t)

    Returns h (B, T, H), and what backward needs: c (B, T, H) and the activated gates (B, T, 4H). The caller gives z
    away: a rung may write the gates over it.
    """
    B, T, _ = z.shape
    H = wh.shape[0]
    h, c, gates = np.empty((B, T, H), z.dtype), np.empty((B, T, H), z.dtype), np.empty_like(z)
    h_before = c_before = np.zeros((B, H), z.dtype)
    for t in range(T):
        i, f, g, o = np.split(z[:, t] + h_before @ wh, 4, axis=1)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        c_before = f * c_before + i * g
        h_before = o * np.tanh(c_before)
        h[:, t], c[:, t], gates[:, t] = h_before, c_before, np.concatenate([i, f, g, o], axis=1)
    return h, c, gates


def lstm_inference(x: Array, wx: Array, wh: Array, b: Array) -> Array:
    """h (B, T, H) of a whole layer from its inputs x (B, T, I), where nothing need be kept for backward.

    wx (I, 4H), b (4H,): `lstm_forward` of the input projections.
    """
    B, T, I = x.shape
    return lstm_forward(dense_forward(x.reshape(B * T, I), wx, b).reshape(B, T, wx.shape[1]), wh)[0]


def lstm_backward(dh: Array, gates: Array, c: Array, wh: Array) -> Array:
    """Back-propagation through time of `lstm_forward`: dz (B, T, 4H), the gradient of the pre-activations.

    gates (B, T, 4H) and c (B, T, H) are forward's, wh (H, 4H); dh (B, T, H) is the loss gradient of every h_t as seen
    by the layers above. From the last step to the first, with dh_t also receiving what comes back through the
    recurrence, and dc_t through the cell:

        do = dh_t * tanh(c_t)          dc_t += dh_t * o * (1 - tanh(c_t)^2)
        di = dc_t * g                  df = dc_t * c_{t-1}             dg = dc_t * i
        dz_t = [di*i*(1-i), df*f*(1-f), dg*(1-g^2), do*o*(1-o)]
        dh_{t-1} += dz_t wh^T          dc_{t-1} = dc_t * f

    dz is all that the weight gradients need: dwx = x^T dz, dwh = h_{t-1}^T dz, db = sum of dz.
    """
    B, T, H = dh.shape
    dz = np.empty_like(gates)
    dh_next = dc_next = np.zeros((B, H), dh.dtype)
    for t in reversed(range(T)):
        i, f, g, o = np.split(gates[:, t], 4, axis=1)
        c_before = c[:, t - 1] if t > 0 else np.zeros((B, H), c.dtype)
        tanh_c = np.tanh(c[:, t])
        dh_t = dh[:, t] + dh_next
        dc_t = dc_next + dh_t * o * (1 - tanh_c**2)
        dz[:, t] = np.concatenate(
            [
                dc_t * g * i * (1 - i),
                dc_t * c_before * f * (1 - f),
                dc_t * i * (1 - g**2),
                dh_t * tanh_c * o * (1 - o),
            ],
            axis=1,
        )
        dh_next = dz[:, t] @ wh.T
        dc_next = dc_t * f
    return dz


# --- loss and optimiser ------------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    """p_k = exp(logit_k) / sum over j of exp(logit_j), row by row; the largest is subtracted first, so none overflows.

    logits (B, K) -> p (B, K), rows sum to 1.
    """
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy_forward(logits: Array, targets: Array, smoothing: float = 0.0) -> tuple[float, Array]:
    """Mean softmax cross-entropy over the batch: (loss, p).

        loss = mean over n of  -sum over k of q[n, k] log p[n, k],      q = (1 - s) onehot(targets) + s / K

    from the logits, not from p, so that a saturated softmax keeps its exact loss. logits (B, K), targets (B,) ints;
    smoothing: s in [0, 1), the share of the probability that is wanted spread over all classes (label smoothing,
    Szegedy et al. 2016).
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    wanted = log_p[np.arange(len(targets)), targets]
    if smoothing:  # else a class that is impossible, log p = -inf, would matter: 0 times infinity
        wanted = log_p.dtype.type(1 - smoothing) * wanted + log_p.dtype.type(smoothing) * log_p.mean(axis=1)
    return float(-wanted.mean()), np.exp(log_p)


def cross_entropy_backward(p: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """dlogits = (p - q) / B, with the q of `cross_entropy_forward`.   p (B, K) -> dlogits (B, K)."""
    dlogits = p - p.dtype.type(smoothing / p.shape[1])
    dlogits[np.arange(len(targets)), targets] -= p.dtype.type(1 - smoothing)
    return dlogits / p.dtype.type(len(targets))


def sgd_update(w: Array, v: Array, dw: Array, lr: float, momentum: float) -> None:
    """Stochastic gradient descent with (plain, not Nesterov) momentum, in place, any shape:

    v <- momentum * v - lr * dw          w <- w + v
    """
    v *= w.dtype.type(momentum)
    v -= w.dtype.type(lr) * dw
    w += v


# --- short-time Fourier transform --------------------------------------------------------------------------------


def hann(frame: int) -> NDArray[np.float64]:
    """The periodic Hann window, 0.5 - 0.5 cos(2 pi n / frame), as spectral analysis wants it."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame) / frame)


def stft_magnitude_forward(x: Array, frame: int, hop: int) -> tuple[Array, Array]:
    """Magnitudes of the short-time Fourier transform, without centring: (magnitude, spectrum).

        spectrum[m, k] = sum over n of  hann[n] * x[m*hop + n] * exp(-2 pi i k n / frame)      magnitude = |spectrum|

    x (N,), N >= frame, frame even -> both (1 + (N - frame) // hop, frame // 2 + 1); samples behind the last whole
    frame are not used.
    """
    frames = sliding_window_view(x, frame)[::hop] * hann(frame).astype(x.dtype)
    spectrum = np.fft.rfft(frames, axis=1)
    return np.abs(spectrum).astype(x.dtype), spectrum


def stft_magnitude_backward(dy: Array, spectrum: Array, frame: int, hop: int, samples: int) -> Array:
    """dx (samples,) of `stft_magnitude_forward`; 0 is taken as the derivative of |s| at s = 0.

        dx[m*hop + n] += hann[n] * sum over k of  Re( dy[m, k] * s[m, k] / |s[m, k]| * exp(2 pi i k n / frame) )

    dy and spectrum s: both (frames, frame // 2 + 1), as forward made them; samples: how many x had. The chain,
    backwards: |s| turns dy into dy * s/|s|; the transform's adjoint is an inverse transform without its 1/frame, in
    which each bin stands for itself alone (irfft counts all but the first and last twice); the window multiplies again,
    and overlapping frames add up.
    """
    size = np.abs(spectrum)
    ds = np.where(size > 0, dy * spectrum / np.where(size > 0, size, 1), 0)
    ds[:, 1:-1] *= 0.5
    frames = np.fft.irfft(ds, n=frame, axis=1) * frame * hann(frame)
    dx = np.zeros(samples, dy.dtype)
    for m, values in enumerate(frames):
        dx[m * hop : m * hop + frame] += values.astype(dy.dtype)
    return dx
