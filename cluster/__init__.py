"""Shared words and what runs where: config, messages, engines, workers, controller."""
