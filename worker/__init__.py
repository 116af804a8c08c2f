"""Node, ranks, publishing, webhooks and sweeps: the only room that knows Ray and Celery."""
