"""Sweeps: many points of a space of values, over the stages of the workspace's own graph, in workspaces of their own."""
