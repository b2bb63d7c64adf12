"""The assistant in service: an engine that writes many answers at a time, and an interface like OpenAI's over it."""
