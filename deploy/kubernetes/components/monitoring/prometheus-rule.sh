#!/bin/sh
# Write prometheus-rule.yaml from the rules that Prometheus reads elsewhere. A test fails when it is forgotten.
set -eu
cd "$(dirname "$0")"
{
  cat <<'HEAD'
# Written by prometheus-rule.sh from deploy/prometheus/rules.yml: change the rules there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: instdisc
spec:
HEAD
  sed -n '/^groups:/,$s/^\(.\)/  \1/p; /^groups:/,$s/^$//p' ../../../prometheus/rules.yml
} > prometheus-rule.yaml
