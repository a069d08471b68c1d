"""OpenAI's API: requests, replies, errors, streams and the schema."""
