"""Stages on warm Ray workers: one computation per key for all who wait, and every process may be killed."""
