"""Benchmark of events: durable subscriptions beside Redis Pub/Sub, Redis Streams and NATS JetStream."""
