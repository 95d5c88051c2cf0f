"""What vLLM 0.32 serves, from its source: for its users, and for whoever owns the engine."""

from __future__ import annotations

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

SERVED = {
    "/v1/completions": "POST",
    "/v1/completions/render": "POST",
    "/v1/completions/derender": "POST",
    "/v1/chat/completions": "POST",
    "/v1/chat/completions/batch": "POST",
    "/v1/chat/completions/render": "POST",
    "/v1/chat/completions/derender": "POST",
    "/v1/responses": "POST",
    "/v1/responses/render": "POST",
    "/v1/responses/resp_0123456789abcdef": "GET",
    "/v1/responses/resp_0123456789abcdef/cancel": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/messages/render": "POST",
    "/v1/embeddings": "POST",
    "/v1/score": "POST",
    "/v1/rerank": "POST",
    "/v1/audio/transcriptions": "POST",
    "/v1/audio/translations": "POST",
    "/v1/realtime": "GET",
    "/v1/systemone": "POST",
    "/v2/embed": "POST",
    "/v2/rerank": "POST",
    "/inference/v1/generate": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/pooling": "POST",
    "/classify": "POST",
    "/score": "POST",
    "/rerank": "POST",
}
"""Path -> the method that it is meant for."""

STREAMED = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/inference/v1/generate",
    "/cohere/v2/chat",
    "/invocations",
}
"""Those that answer `"stream": true` by server-sent events."""

ONLY_UPSTREAM = {
    "/cohere/v2/chat": "POST",
    "/cohere/v2/chat/render": "POST",
    "/generative_scoring": "POST",
    "/invocations": "POST",
    "/docs": "GET",
    "/redoc": "GET",
    "/openapi.json": "GET",
    "/load": "GET",
    "/metrics": "GET",
    "/ping": "GET",
    "/tokenizer_info": "GET",
    "/version": "GET",
}
"""What else it serves for its users, where the path says which engine is meant."""

DEVELOPMENT = [
    # Development endpoints, and those of reinforcement learning.
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/release_kv_cache_memory",
    "/collective_rpc",
    "/server_info",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/pause",
    "/resume",
    "/is_paused",
    "/abort_requests",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_info",
    "/weight_checker",
    "/get_world_size",
    # What its operator turns on, and what changes the engine for everybody.
    "/inference/v1/abort_requests",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/adapters",
    "/adapters/name",
    "/start_profile",
    "/stop_profile",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/fault_tolerance/apply",
    "/fault_tolerance/status",
    "/kv_event_sources",
]
"""What clients must not reach, whatever way they take."""
