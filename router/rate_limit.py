"""How many requests a key may make: a bucket of permits that fills at a steady rate. Pure."""

from dataclasses import dataclass

from router.api_keys import ApiKey


@dataclass(slots=True)
class _Bucket:
    permits: float
    at: float


class RateLimits:
    """One router's share of every key's limit; with several, a load balancer spreads requests."""

    def __init__(self, num_routers: int) -> None:
        self._num_routers = num_routers
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: ApiKey, now: float) -> float | None:
        """Take a permit; return None if there was one, else in how many seconds there will be."""
        if key.requests_per_minute is None:
            return None
        rate = key.requests_per_minute / 60 / self._num_routers
        capacity = max(1.0, key.capacity / self._num_routers)
        bucket = self._buckets.setdefault(key.sha256, _Bucket(capacity, now))
        filled = bucket.permits + max(0.0, now - bucket.at) * rate
        bucket.permits, bucket.at = min(capacity, filled), max(now, bucket.at)
        if bucket.permits < 1.0:
            return (1.0 - bucket.permits) / rate
        bucket.permits -= 1.0
        return None
