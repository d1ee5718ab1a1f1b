"""Builds the Serve application: `serve run tailserve.deployments.app:build` or a RayService's import path."""

from __future__ import annotations

from typing import Any

from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.deployments import ingress, router


def build(args: dict[str, Any]) -> Any:
    """The application for a configuration given as a mapping. ConfigError names what is wrong with it."""
    return build_app(parse_config(args))


def build_app(config: TailserveConfig) -> Any:
    """The application for a checked configuration: ingresses in front of routers."""
    return ingress.deployment(config, router.deployment(config))
