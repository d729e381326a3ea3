"""Edit a built module, and keep track of its new layers."""

from rfa_mmdet.models.retrofit.retrofit import retrofit

__all__ = ["retrofit"]
