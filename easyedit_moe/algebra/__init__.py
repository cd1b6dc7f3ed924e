"""The mathematics of an edit: routed keys, null spaces, Tucker bases and solvers; pure, of torch only.

Its modules import nothing but torch, each other and the package's errors, so they know of no model and no file.

The solvers minimise one objective for expert updates:

    min over Delta of  sum_t || r_t - sum_j g_tj Delta_j k_tj ||^2 + lambda sum_j tr(Delta_j M_j^{-1} Delta_j^T)

``M_j`` is the *metric*: the identity (plain ridge), the null-space projector ``P_j`` (MoEEdit, AlphaEdit lifted to
experts) or the inverse covariance ``C_j^{-1}`` (MEMIT and ROME lifted). It is known by a root N_j, ``M_j = N_j^T N_j``,
so all that iterates sees ``F_j = N_j Z_j`` of the gated keys ``Z_j [h, T_j]`` and ``K_j = F_j^T F_j``. No solver forms
an update ``[E, d, h]``: solutions stay factored until they are written.

The side on which a system is set up follows from the sizes. T = tokens, n_j = rows of N_j (h, or less for a projector):

| solver | dual, where its side is less | primal | float64 held at once |
|--------|------------------------------|--------|----------------------|
| exact | T x T | sum_j n_j, its Gram summed over tokens | side^2 + 2 T K h + 2 T d |
| BCD | T_j x T_j, per expert | n_j x n_j, per expert | sum_j side_j^2 + 2 T K h + T K d |
| MoTE | T x T | re ri, its Gram summed over tokens | side^2 + T K (h + ri) + 2 T d |

Systems are factored in place, so one of side T costs 8 T^2 bytes: 8 MB at T = 1000, 800 MB at T = 10 000. The primal
form is only taken for lambda > 0; without a ridge more tokens than unknowns are a singular system, which is an error.
"""
