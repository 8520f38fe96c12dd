//! Hierarchical attention: coarsen, attend per level, merge.
