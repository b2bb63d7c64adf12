"""What people said to the assistant in service, and what they think of its answers."""
