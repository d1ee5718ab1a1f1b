"""Makes a draft for a verifier out of nothing but the verifier."""
