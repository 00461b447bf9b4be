"""A plug-in of vLLM, which serves packed models and packs 2:4 ones while it loads them.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in each of
its processes, whatever model they serve. An exception there would break vLLM for every model of the
environment, and an import would slow each start down. So `register` catches everything, and nothing
of ours but the class of the configuration is loaded before a layer of ours is made. vLLM is no
dependency: nobody but vLLM imports what needs it.

`names` and `storage` know nothing of vLLM; `config` and `linear` are what vLLM calls.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make vLLM know our quantisation method; it may be called any number of times."""
    try:
        from vllm.model_executor.layers.quantization import (
            get_quantization_config,
            register_quantization_config,
        )

        from proxsparse.vllm.config import METHOD, SparseConfig

        try:
            is_known = get_quantization_config(METHOD) is SparseConfig
        except ValueError:  # an unknown method
            is_known = False
        if not is_known:
            register_quantization_config(METHOD)(SparseConfig)
    except Exception:  # vLLM would stop, also where it serves a model that is none of ours
        logging.getLogger("vllm.plugins.proxsparse").warning(
            "proxsparse's packed models cannot be served by this vLLM", exc_info=True
        )
