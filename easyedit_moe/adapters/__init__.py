"""MEMoE's bypass adapter: its module, how it hangs on a model, and its training."""
