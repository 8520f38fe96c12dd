//! Exact softmax attention by tiles, at the machine's limit.
