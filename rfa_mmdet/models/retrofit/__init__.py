"""Edit a module that is built, and keep track of what is new in it."""

from rfa_mmdet.models.retrofit.retrofit import retrofit

__all__ = ["retrofit"]
