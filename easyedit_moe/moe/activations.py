"""What the model's own forwards hold: with and without a gradient, by the shapes of its layers.

Counted as transformers' packed experts and attention by ``scaled_dot_product_attention`` compute, which every model has
by default: experts gather the inputs of all K choices of each token, multiply, weigh and put them back; a gradient
keeps queries, repeated keys and values, and what enters each nonlinearity, norms in float32. Attention that holds its
scores ("eager") needs more.
"""

from __future__ import annotations

from easyedit_moe.moe.shapes import Shapes


def inference(shapes: Shapes, tokens: int) -> int:
    """Bytes at the peak of a forward without a gradient: in the experts of some layer, or in its attention."""
    item, d, h, k = shapes.itemsize, shapes.d_model, shapes.d_hidden, shapes.active
    experts = k * (item * max(4 * d, d + 4 * h) + 44) + item * shapes.experts
    attention = item * (3 * shapes.queries + 2 * shapes.read)
    return tokens * (max(experts, attention) + 4 * item * d)


def kept_for_gradient(shapes: Shapes, tokens: int, routed: int, attended: int) -> int:
    """Bytes that one layer keeps of a forward for the gradient by its inputs.

    Args:
        shapes: of the model.
        tokens: that the layer computes, padding included.
        routed: those of them that its experts compute.
        attended: positions of keys and values that it reads, cached ones and padding included.
    """
    item, d, h, k = shapes.itemsize, shapes.d_model, shapes.d_hidden, shapes.active
    norms = 4 * (2 * d + shapes.queries + shapes.cached)
    attention = tokens * (norms + 2 * item * shapes.queries + 4 * shapes.experts)
    keys = 2 * item * attended * shapes.read
    return attention + keys + routed * k * (item * (3 * h + d) + 24)


def passing(shapes: Shapes, routed: int) -> int:
    """Bytes beyond what is kept while the experts of one layer are computed, or their gradient is."""
    return 3 * shapes.itemsize * routed * shapes.active * shapes.d_model


def scored(shapes: Shapes, tokens: int) -> int:
    """Bytes of the logits at the tokens that are scored, in float32: three at once, such as log-softmax's gradients."""
    return 3 * 4 * tokens * shapes.vocabulary
