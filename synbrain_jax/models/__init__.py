"""Pure Flax linen modules: `params` in, arrays out. No losses, no files."""
