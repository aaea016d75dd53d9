"""Metrics, statistics, and the evaluation of policies and reward models."""
