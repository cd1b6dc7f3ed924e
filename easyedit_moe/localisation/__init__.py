"""Where a model keeps a fact: reachability of targets, causal tracing and routing, layer by layer."""
