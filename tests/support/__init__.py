"""What tests share: tiny models, groups, servers that fail on purpose."""
