"""A rank's training: `worker` builds everything in order, `loop` trains, the rest is what they are made of."""
