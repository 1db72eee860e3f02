"""The discrete Fourier transform: y[k] = Σₙ x[n] exp(-2πi kn / N), a matrix product y = F x.

The gradient of y = F x is Fᵀ g, and F is symmetric: the backward pass of a transform is the
same transform. (Not its inverse: JAX conjugates nothing.) The inverse transform, conj(F)/N, is
symmetric as well.

The transforms of real arrays store the first half of a spectrum whose second half mirrors it.
An entry with a mirror image stands for two: its gradient counts twice where a spectrum goes in,
and is halved where one came out.
"""

from __future__ import annotations

import math

from jax import lax

from fnn.backprop.rules import LocalRule, each


def _fft(g, y, x, *, fft_type, fft_lengths, **params):
    """∂L/∂x = Fᵀ g.

    FFT, IFFT    the same transform of g, for F is symmetric
    RFFT         irfft(N conj(g) / c)
    IRFFT        conj(c rfft(g) / N)

    N is the number of entries transformed. c counts for whom an entry of the half spectrum
    stands: 2, itself and its mirror image, but 1 at frequency 0 and at the highest frequency
    of an even length, which are their own mirror images.
    """
    n = math.prod(fft_lengths)
    if fft_type == lax.FftType.RFFT:
        weights = _half_spectrum(n, n / 2, fft_lengths[-1], like=g)
        return lax.fft(lax.mul(lax.conj(g), weights), lax.FftType.IRFFT, fft_lengths)
    if fft_type == lax.FftType.IRFFT:
        spectrum = lax.fft(g, lax.FftType.RFFT, fft_lengths)
        weights = _half_spectrum(1 / n, 2 / n, fft_lengths[-1], like=spectrum)
        return lax.conj(lax.mul(spectrum, weights))
    return lax.fft(g, fft_type, fft_lengths)


def _half_spectrum(own, paired, length: int, like):
    """`own` at the frequencies that mirror themselves, `paired` elsewhere, in `like`'s shape."""
    even = 1 - length % 2
    value = lambda v, n: lax.full(n, v, like.dtype)
    middle = value(paired, (like.shape[-1] - 1 - even,))
    return lax.broadcast(lax.pad(middle, value(own, ()), [(1, even, 0)]), like.shape[:-1])


RULES: dict[str, LocalRule] = {"fft": each(_fft, local_gradient=("F, the transform itself",))}
