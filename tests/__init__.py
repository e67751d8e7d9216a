"""Tests; packages, so that two tiers may name a file alike."""
