"""Decompositions of matrices and solutions of triangular systems.

Each formula answers: an upstream gradient for every factor is given; what is the gradient of
the decomposed matrix? They come from writing down the differential of the defining equation
(A = L Lᴴ, say), solving it for the factors' differentials, and moving all matrices from one
side of the trace inner product to the other (Giles, "Collected matrix derivative results for
forward and reverse mode algorithmic differentiation", 2008).

Two conventions meet here. The literature pairs a gradient Ȳ with a change dY as Re tr(Ȳᴴ dY);
JAX pairs g with it as Re Σ g·dY, so that Ȳ is the conjugate of g. For real matrices they are
one. `_textbook` translates, so that each formula below reads as in its source. Xᴴ is the
conjugate transpose, which is the transpose for real X.

All work on the last two axes of arrays with any number of leading batch axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax.linalg import eig_p, svd_p, triangular_solve, tridiagonal_solve

from fnn.backprop.rules import ControlRule, LocalRule, joint, zero
from fnn.eager import apply


def _textbook(*, local_gradient: tuple[str, ...]):
    """A rule from a formula `f(ȳ, y, a, **params) -> ā` in the literature's convention."""

    def rule(formula):
        @functools.wraps(formula)
        def translated(needed, g, y, a, **params):
            return (_in_jax_convention(formula, g, y, a, params),)

        return joint(translated, local_gradient=local_gradient)

    return rule


def _factors(*, local_gradient: tuple[str, ...]):
    """The same for a decomposition into factors, of which perhaps only one gets a gradient.

    ȳ is None for the others, and the formula leaves their part out: the eigenvalues alone take
    one product, with the eigenvectors it's three. The forward pass keeps what the formula needs
    even if nobody asked for it: the singular vectors, to differentiate the singular values.
    """

    def rule(formula):
        def forward(equation, needed, ins, opaque):
            (a,), vectors = ins, _VECTORS.get(equation.name)
            if vectors is None or vectors.wanted(equation.params):
                outs = apply(equation, ins)
                return outs, (outs, a)
            kept = vectors.decompose(a, equation.params)
            return [kept[0]], (kept, a)

        def backward(equation, needed, saved, g, opaque):
            y, a = saved
            with equation.context.manager:
                return (_in_jax_convention(formula, list(g), y, a, equation.params),)

        return ControlRule(forward, backward, local_gradient)

    return rule


def _in_jax_convention(formula, g, y, a, params):
    """conj(formula(conj(g), ...)), real where a is."""
    conjugate = functools.partial(jax.tree.map, jnp.conj)
    with jax.default_matmul_precision("highest"):
        gradient = formula(conjugate(g), y, a, **params)
    return conjugate(gradient) if a.dtype == gradient.dtype else lax.real(gradient)


# ------------------------------------------------------------------------- triangular systems


def _triangular_solve(
    needed, g, x, a, b, *, left_side, lower, transpose_a, conjugate_a, unit_diagonal
):
    """x = op(A)⁻¹ b (or b op(A)⁻¹): one more triangular solve, with the transposed matrix.

    From op(A) x = b:  ∂L/∂b = op(A)⁻ᵀ g  and  ∂L/∂op(A) = -(∂L/∂b) xᵀ  (Giles, section 2.3.1;
    the mirror image for b on the left), in JAX's convention, without conjugates. op transposes
    and conjugates as the flags say, and only the named triangle of A takes part.
    """

    def solve_transposed(rhs):
        return triangular_solve(
            a,
            rhs,
            left_side=left_side,
            lower=lower,
            transpose_a=not transpose_a,
            conjugate_a=conjugate_a,
            unit_diagonal=unit_diagonal,
        )

    a_needed, b_needed = needed
    with jax.default_matmul_precision("highest"):
        few = x.shape[-1 if left_side else -2] <= a.shape[-1]
        g_b = solve_transposed(g) if b_needed or few else None
        if not a_needed:
            return None, g_b
        # With many right-hand sides and no wish for their gradient, solving last is cheaper.
        outer = g if g_b is None else g_b
        outer = outer @ x.mT if left_side else x.mT @ outer
        g_a = -(solve_transposed(outer) if g_b is None else outer)
    g_a = g_a.mT if transpose_a else g_a
    g_a = g_a.conj() if conjugate_a else g_a
    strictly = int(unit_diagonal)
    return (_tril(g_a, -strictly) if lower else _triu(g_a, strictly)), g_b


def _tridiagonal_solve(needed, g, x, below, diagonal, above, b, **params):
    """T x = b with three diagonals: ∂L/∂b = T⁻ᵀ g, and ∂L/∂T = -(∂L/∂b) xᵀ on the diagonals.

    T[i, i-1] = below[i] and T[i, i+1] = above[i]; below[0] and above[-1] lie outside of T.
    """
    zero_first = lambda d: jnp.concatenate([lax.full_like(d[..., :1], 0), d[..., 1:]], -1)
    zero_last = lambda d: jnp.concatenate([d[..., :-1], lax.full_like(d[..., :1], 0)], -1)
    down = zero_first(jnp.roll(above, 1, -1))  # the transpose's diagonals
    up = zero_last(jnp.roll(below, -1, -1))
    g_b = tridiagonal_solve(down, diagonal, up, g, **params)
    g_below = zero_first(-(g_b * jnp.roll(x, 1, -2)).sum(-1))
    g_above = zero_last(-(g_b * jnp.roll(x, -1, -2)).sum(-1))
    return g_below, -(g_b * x).sum(-1), g_above, g_b


# ------------------------------------------------------------------------------ factorisations


@_textbook(local_gradient=("Φ(S + Sᴴ) with S = L⁻ᴴ Φ(Lᴴ L̄) L⁻¹",))
def _cholesky(l_bar, l, a, **_):
    """A = L Lᴴ.  S = L⁻ᴴ Φ(Lᴴ L̄) L⁻¹,  Ā = Φ(S + Sᴴ),  Φ: lower triangle, half the diagonal.

    (Murray, "Differentiation of the Cholesky decomposition", 2016, equations 8 to 10.) The
    decomposition reads only A's lower triangle, so only that gets a gradient; an entry
    stands for its mirror image as well. JAX before 0.11 spread it over both triangles; the two
    are the same for a symmetric A = B + Bᴴ, as `symmetrize_input` makes it.
    """
    l = _tril(l)
    s = triangular_solve(l, _half_lower(l.mT.conj() @ l_bar), lower=True)
    s = triangular_solve(l, s, left_side=True, lower=True, transpose_a=True, conjugate_a=True)
    return _half_lower(s + s.mT.conj())


@_textbook(local_gradient=("Pᵀ L⁻ᴴ [tril(Lᴴ Ȳ) + triu(Ȳ Uᴴ)] U⁻ᴴ",))
def _lu(bars, outputs, a, **_):
    """A[p] = L U, both stored in one matrix Y.

    X = strictly lower part of Lᴴ Ȳ + upper part of Ȳ Uᴴ,   Ā[p] = L⁻ᴴ X U⁻ᴴ

    (de Hoog, Anderssen and Lukas, "Differentiation of matrix functionals using triangular
    factorization", 2011.) For a rectangular A, L and U are completed to square by ones on
    their diagonals.
    """
    (y_bar, *_), (y, _, permutation) = bars, outputs
    *_, m, n = a.shape
    k = min(m, n)
    keep = [(0, 0, 0)] * (a.ndim - 2)
    nothing = lax.full((), 0, a.dtype)
    l = lax.pad(_tril(y[..., :, :k], -1), nothing, [*keep, (0, 0, 0), (0, m - k, 0)])
    l = l + _identity_like(l)
    u = lax.pad(_triu(y[..., :k, :]), nothing, [*keep, (0, n - k, 0), (0, 0, 0)])
    u = jnp.where(_diagonal_of(u) & (_row_of(u) >= k), 1, u).astype(u.dtype)
    x = _tril(l.mT.conj() @ y_bar, -1) + _triu(y_bar @ u.mT.conj())
    adjoint = {"transpose_a": True, "conjugate_a": True}
    x = triangular_solve(l, x, left_side=True, lower=True, unit_diagonal=True, **adjoint)
    x = triangular_solve(u, x, **adjoint)
    return jnp.take_along_axis(x, _inverse(permutation)[..., :, None], axis=-2)


@_factors(local_gradient=("[Q̄ + Q sym(R̄ Rᴴ - Qᴴ Q̄)] R⁻ᴴ",))
def _qr(bars, outputs, a, *, pivoting, full_matrices, **_):
    """A = Q R, or A with its columns permuted.

    M = R̄ Rᴴ - Qᴴ Q̄,   Ā = [Q̄ + Q sym(M)] R⁻ᴴ

    where sym mirrors the upper triangle onto the lower (Seeger et al., "Auto-differentiating
    linear algebra", 2017; Walter and Lehmann, "Algorithmic differentiation of linear algebra
    functions", 2010).

    Tall A with all of Q (Roberts and Roberts, arXiv 2009.10071 and 2409.13374): the surplus
    columns Q₂ of Q depend on the first ones, Q₁; their gradient is first brought back to these.

    Wide A = [A₁ A₂]: A₁ = Q R₁ as for a square matrix, and R₂ = Qᴴ A₂ gives Ā₂ = Q R̄₂ and
    adds A₂ R̄₂ᴴ to Q̄.
    """
    (q_bar, r_bar), (q, r) = bars[:2], outputs[:2]
    *_, m, n = a.shape
    if m < n:
        r_1, r_2, r_1_bar = r[..., :, :m], r[..., :, m:], None
        if r_bar is not None:
            r_1_bar, r_2_bar = r_bar[..., :, :m], r_bar[..., :, m:]
            a_2 = q @ r_2 if pivoting else a[..., :, m:]
            q_bar = _sum(q_bar, a_2 @ r_2_bar.mT.conj())
        a_bar = _thin_qr(q_bar, r_1_bar, q, r_1)
        a_2_bar = jnp.zeros_like(r_2) if r_bar is None else q @ r_2_bar
        a_bar = jnp.concatenate([a_bar, a_2_bar], axis=-1)
    else:
        if full_matrices and m > n:
            q_bar = None if q_bar is None else _completed_q(q_bar, q, n)
            r_bar = None if r_bar is None else r_bar[..., :n, :]
            q, r = q[..., :, :n], r[..., :n, :]
        a_bar = _thin_qr(q_bar, r_bar, q, r)
    if pivoting:
        a_bar = jnp.take_along_axis(a_bar, _inverse(outputs[2])[..., None, :], axis=-1)
    return a_bar


def _thin_qr(q_bar, r_bar, q, r):
    """[Q̄ + Q sym(R̄ Rᴴ - Qᴴ Q̄)] R⁻ᴴ, where None is zero."""
    m = None if r_bar is None else r_bar @ r.mT.conj()
    m = m if q_bar is None else _sum(m, -(q.mT.conj() @ q_bar))
    upper = _triu(m, 1)
    m = upper + upper.mT.conj() + jnp.where(_diagonal_of(m), m.real.astype(m.dtype), 0)
    return triangular_solve(r, _sum(q_bar, q @ m), transpose_a=True, conjugate_a=True)


def _completed_q(q_bar, q, n):
    """The gradient of Q₁ = Q[:, :n], with that of the columns that complete it to a basis.

    With Z = Q₂₁(Q₁₁ - I)⁻¹, where Q₁₁ and Q₂₁ are Q₁'s first n and other rows, the completion
    changes by dQ₂ = dQ₁ Zᴴ - (Q₁ + Q₂ Z)(dQ₂₁ - Z dQ₁₁)ᴴ  (arXiv 2409.13374, equations 32, 33).
    """
    q_1, q_2, q_2_bar = q[..., :, :n], q[..., :, n:], q_bar[..., :, n:]
    q_11, q_21 = q_1[..., :n, :], q_1[..., n:, :]
    z = jnp.linalg.solve((q_11 - _identity_like(q_11)).mT.conj(), q_21.mT.conj()).mT.conj()
    e_bar = -q_2_bar.mT.conj() @ (q_1 + q_2 @ z)
    return q_bar[..., :, :n] + q_2_bar @ z + jnp.concatenate([-z.mT.conj() @ e_bar, e_bar], axis=-2)


# ------------------------------------------------------------ eigenvalues and singular values
#
# Eigenvectors turn towards each other at a rate of 1 / (difference of their eigenvalues):
# these gradients are infinite where eigenvalues coincide.


@_factors(local_gradient=("V (diag(w̄) + F ∘ Vᴴ V̄) Vᴴ with F = 1 / (w[j] - w[i])",))
def _eigh(bars, outputs, a, *, subset_by_index=None, **_):
    """A = V diag(w) Vᴴ.  Ā = V (diag(w̄) + F ∘ Vᴴ V̄) Vᴴ,  F[i,j] = 1 / (w[j] - w[i])

    (Giles, section 3.1). With V̄ = 0, this is the sum of w̄[i] v[i] v[i]ᴴ.
    """
    if subset_by_index not in (None, (0, a.shape[-1])):
        raise NotImplementedError(
            "eigh with subset_by_index has no gradient: it depends on the eigenvectors left out."
        )
    (v_bar, w_bar), (v, w) = bars, outputs
    if v_bar is None:
        return (v * w_bar[..., None, :].astype(v.dtype)) @ v.mT.conj()
    middle = _inverse_differences(w).astype(v.dtype) * (v.mT.conj() @ v_bar)
    if w_bar is not None:
        middle = middle + _diagonal_matrix(w_bar.astype(v.dtype))
    return v @ middle @ v.mT.conj()


@_factors(
    local_gradient=(
        "U [(J + Jᴴ) Σ + Σ (K + Kᴴ) + diag(s̄)] Vᴴ with J = F ∘ UᴴŪ, K = F ∘ VᴴV̄ "
        "(and a part outside U and V if A isn't square)",
    )
)
def _svd(bars, outputs, a, *, full_matrices, compute_uv, subset_by_index=None, **params):
    """A = U Σ Vᴴ.  With F[i,j] = 1 / (s[j]² - s[i]²),  J = F ∘ UᴴŪ,  K = F ∘ VᴴV̄:

    Ā = U [(J + Jᴴ) Σ + Σ (K + Kᴴ) + diag(s̄ + i Im diag(UᴴŪ) / s)] Vᴴ
        + (I - U Uᴴ) Ū Σ⁻¹ Vᴴ       where A has more rows than columns
        + U Σ⁻¹ V̄ᴴ (I - V Vᴴ)       where it has more columns

    (Giles, section 3.2; Townsend, "Differentiating the singular value decomposition", 2016; the
    imaginary part: Wan and Zhang, arXiv 1909.02659.) Without U and V, s alone: U diag(s̄) Vᴴ.
    """
    *_, m, n = a.shape
    rank = min(m, n)
    if compute_uv and full_matrices and m != n:
        raise NotImplementedError(
            "svd with full_matrices=True has no gradient for a matrix that is not square: the "
            "surplus vectors are not unique. Use full_matrices=False."
        )
    if compute_uv and subset_by_index not in (None, (0, rank)):
        raise NotImplementedError(
            "svd with subset_by_index and compute_uv=True has no gradient: it depends on the "
            "singular vectors left out."
        )
    (s, u, vh), s_bar = outputs, bars[0]
    u_bar, vh_bar = bars[1:] if compute_uv else (None, None)
    if u_bar is None and vh_bar is None:
        return (u * s_bar[..., None, :].astype(u.dtype)) @ vh
    s_row, uh, v = s[..., None, :].astype(u.dtype), u.mT.conj(), vh.mT.conj()
    # F[i,j] s[j] as s[j] / (s[i] + s[j]) · 1 / (s[j] - s[i]): no square is too large for a number.
    sums = s[..., :, None] + s[..., None, :]
    share = (s[..., None, :] / jnp.where(sums == 0, 1, sums)).astype(u.dtype)
    apart = _inverse_differences(s).astype(u.dtype)
    middle = None if s_bar is None else _diagonal_matrix(s_bar.astype(u.dtype))
    surplus = None
    if u_bar is not None:
        uh_u_bar = uh @ u_bar
        middle = _sum(middle, apart * (share * (uh_u_bar - uh_u_bar.mT.conj())))
        if jnp.iscomplexobj(u):
            turn = lax.complex(jnp.zeros_like(s), jnp.diagonal(uh_u_bar, 0, -2, -1).imag)
            sizes = jnp.where(s == 0, jnp.inf, s).astype(u.dtype)
            middle = middle + _diagonal_matrix(turn / sizes)
        if m > n:
            surplus = ((u_bar - u @ uh_u_bar) / s_row) @ vh
    if vh_bar is not None:
        v_bar = vh_bar.mT.conj()
        vh_v_bar = vh @ v_bar
        middle = _sum(middle, apart * (share.mT * (vh_v_bar - vh_v_bar.mT.conj())))
        if n > m:
            surplus = _sum(surplus, (u / s_row) @ (vh_bar - (vh_bar @ v) @ vh))
    return _sum(surplus, u @ middle @ vh)


@_factors(local_gradient=("V⁻ᴴ (diag(w̄) + conj(F) ∘ VᴴV̄) Vᴴ with F = 1 / (w[j] - w[i])",))
def _eig(
    bars,
    outputs,
    a,
    *,
    compute_left_eigenvectors,
    compute_right_eigenvectors,
    enable_eigvec_derivs=False,
    **params,
):
    """A V = V diag(w), for any square A, with complex w and V.

    w alone:   Ā = V⁻ᴴ diag(w̄) Vᴴ
    with V:    Ā = V⁻ᴴ (diag(w̄) + conj(F) ∘ VᴴŪ) Vᴴ,   F[i,j] = 1 / (w[j] - w[i])

    (Giles, section 3.1; Boeddeker et al., arXiv 1701.00392.) Ū is V̄ less what an eigenvector's
    free factor takes up: LAPACK makes each of them of length 1, with its largest entry real.
    Left eigenvectors are the right ones of Aᴴ, whose eigenvalues are conj(w).
    """
    any_vectors = compute_left_eigenvectors or compute_right_eigenvectors
    if any_vectors and not enable_eigvec_derivs:
        raise NotImplementedError(
            "The gradient of eigenvectors of a matrix that is not symmetric is only valid under "
            "assumptions that cannot be checked; pass enable_eigvec_derivs=True to "
            "jax.lax.linalg.eig to say that they hold, or use its eigenvalues alone."
        )
    w_bar, *vector_bars = bars
    w, *vectors = outputs
    left_bar = vector_bars[0] if compute_left_eigenvectors else None
    right_bar = vector_bars[-1] if compute_right_eigenvectors else None
    if not compute_right_eigenvectors and any_vectors and w_bar is not None:
        # Left and right eigenvectors of one eigenvalue are orthogonal to all others: V ∝ W⁻ᴴ.
        vectors.append(jnp.linalg.inv(vectors[0]).mT.conj())
    a_bar = None
    if w_bar is not None or right_bar is not None:
        a_bar = _eigenvectors(w_bar, right_bar, w, vectors[-1])
    if left_bar is not None:
        a_bar = _sum(a_bar, _eigenvectors(None, left_bar, w.conj(), vectors[0]).mT.conj())
    return a_bar


def _eigenvectors(w_bar, v_bar, w, v):
    """V⁻ᴴ (diag(w̄) + conj(F) ∘ VᴴŪ) Vᴴ, where None is zero."""
    vh = v.mT.conj()
    if v_bar is None:
        return jnp.linalg.solve(vh, w_bar[..., :, None] * vh)
    along = (v.conj() * v_bar).sum(-2, keepdims=True)
    largest = _row_of(v) == jnp.argmax(jnp.abs(v), axis=-2, keepdims=True)
    at_largest = jnp.where(largest, v.real, 0).sum(-2, keepdims=True)
    turn = lax.complex(jnp.zeros_like(along.real), along.imag / at_largest)
    u_bar = v_bar - v * along.real.astype(v.dtype) - jnp.where(largest, turn, 0)
    middle = _inverse_differences(w).conj() * (vh @ u_bar)
    if w_bar is not None:
        middle = middle + _diagonal_matrix(w_bar)
    return jnp.linalg.solve(vh, middle @ vh)


class _Vectors(NamedTuple):
    """For decompositions that can leave their vectors out: are they wanted, and how to get them."""

    wanted: Callable[[dict], bool]
    decompose: Callable[[Any, dict], list]


_VECTORS = {
    "svd": _Vectors(
        lambda params: params["compute_uv"],
        lambda a, params: svd_p.bind(a, **params | {"compute_uv": True, "full_matrices": False}),
    ),
    "eig": _Vectors(
        lambda params: params["compute_left_eigenvectors"] or params["compute_right_eigenvectors"],
        lambda a, params: eig_p.bind(a, **params | {"compute_right_eigenvectors": True}),
    ),
}

# -------------------------------------------------------------------------------- small helpers


def _sum(x, y):
    """x + y, where None is zero."""
    return y if x is None else x if y is None else x + y


def _row_of(x):
    return lax.broadcasted_iota(int, x.shape, x.ndim - 2)


def _diagonal_of(x):
    return _row_of(x) == lax.broadcasted_iota(int, x.shape, x.ndim - 1)


def _tril(x, k: int = 0):
    """The entries on and below the k-th diagonal."""
    below = _row_of(x) + k >= lax.broadcasted_iota(int, x.shape, x.ndim - 1)
    return lax.select(below, x, lax.full_like(x, 0))


def _triu(x, k: int = 0):
    """The entries on and above the k-th diagonal."""
    above = _row_of(x) + k <= lax.broadcasted_iota(int, x.shape, x.ndim - 1)
    return lax.select(above, x, lax.full_like(x, 0))


def _half_lower(x):
    """Φ: the lower triangle, with half the diagonal. (The diagonal of a Hermitian is real.)"""
    return lax.select(_diagonal_of(x), x * 0.5, _tril(x))


def _identity_like(x):
    return _diagonal_of(x).astype(x.dtype)


def _diagonal_matrix(d):
    square = jnp.broadcast_to(d[..., None, :], (*d.shape, d.shape[-1]))
    return jnp.where(_diagonal_of(square), square, 0)


def _inverse_differences(w):
    """F[i, j] = 1 / (w[j] - w[i]), and 0 on the diagonal."""
    differences = w[..., None, :] - w[..., :, None]
    diagonal = _identity_like(differences)
    return 1 / (differences + diagonal) - diagonal


def _inverse(permutation):
    """The permutation that undoes another, along the last axis."""
    place = lax.broadcasted_iota(permutation.dtype, permutation.shape, permutation.ndim - 1)
    return lax.sort_key_val(permutation, place)[1]


RULES: dict[str, LocalRule | ControlRule] = {
    "triangular_solve": joint(_triangular_solve, local_gradient=("-(∂b) xᵀ", "op(a)⁻ᵀ g")),
    "tridiagonal_solve": joint(
        _tridiagonal_solve, local_gradient=("-(∂b) xᵀ", "-(∂b) xᵀ", "-(∂b) xᵀ", "T⁻ᵀ g")
    ),
    "cholesky": _cholesky,
    "lu": _lu,
    "lu_pivots_to_permutation": zero,
    "qr": _qr,
    "eigh": _eigh,
    "svd": _svd,
    "eig": _eig,
}
