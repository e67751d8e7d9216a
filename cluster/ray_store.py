"""Ray's internal key-value store (GCS), which Ray Serve keeps its own state in too."""

from ray.experimental import internal_kv

_NAMESPACE = "tandem"


class RayStore:
    """Fills `controller_store.KeyValueStore` in a process that is connected to Ray."""

    def get(self, key: str) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return value

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)

    def put_new(self, key: str, value: bytes) -> bool:
        was_there = internal_kv._internal_kv_put(key, value, overwrite=False, namespace=_NAMESPACE)
        return not was_there

    def delete(self, key: str) -> None:
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]
