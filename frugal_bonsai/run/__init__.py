"""Whole commands: inspect, plan, prune, evaluate. Each returns plain values; nothing is printed."""
