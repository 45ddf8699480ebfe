"""One step of Adapting by Pruning against a dense fine-tuning step and against the eager way of masking."""
