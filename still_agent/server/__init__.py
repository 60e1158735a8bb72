"""An OpenAI-compatible server: agents of one model, for clients over HTTP. See docs/server.md."""
