"""Speculative decoding: what a drafter is, n-gram drafts, sampling and verification."""
