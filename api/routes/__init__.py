"""One small file a group of routes; `api.app` puts them together."""
