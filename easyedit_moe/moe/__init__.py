"""The model: its MoE layers and experts, what a forward shows of them, and how a checkpoint is loaded."""
