"""Schedules, samplers, guidance, noise and losses; knows functions of (x, t), never a model's class."""
