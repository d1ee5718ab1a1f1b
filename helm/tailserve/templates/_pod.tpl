{{- /*
The pod template of the head, or of a worker group: (dict "root" $ "group" values "kind" "head" or "worker").
Nothing in it may depend on the chart's or the application's version.
*/ -}}
{{- define "tailserve.pod" -}}
{{- $values := .root.Values -}}
{{- $group := .group -}}
metadata:
  labels:
    {{- include "tailserve.selector" .root | nindent 4 }}
    tailserve/component: {{ .kind }}
    {{- with $group.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $group.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "tailserve.serviceAccountName" .root }}
  # The autoscaler beside the head asks the API server.
  automountServiceAccountToken: {{ and (eq .kind "head") $values.autoscaler.enabled }}
  terminationGracePeriodSeconds: {{ add $values.drainSeconds 60 }}
  {{- with include "tailserve.priorityClassName" .root }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml . | nindent 6 }}
      labelSelector:
        matchLabels:
          {{- include "tailserve.selector" $.root | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray-{{ .kind }}
      image: {{ include "tailserve.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      env:
        {{- include "tailserve.env" (dict "root" .root "kind" .kind) | nindent 8 }}
      ports:
        {{- if eq .kind "head" }}
        - {name: gcs, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
      resources:
        {{- toYaml $group.resources | nindent 8 }}
      {{- include "tailserve.probes" . | nindent 6 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/tailserve}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if $values.modelCache.enabled }}
        - {name: models, mountPath: /models}
        {{- end }}
        {{- if $values.tenantsSecret.name }}
        - {name: tenants, mountPath: /etc/tailserve/tenants, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemorySize }}}}
    {{- if $values.modelCache.enabled }}
    - {name: models, persistentVolumeClaim: {claimName: {{ include "tailserve.cacheClaim" .root }}}}
    {{- end }}
    {{- if $values.tenantsSecret.name }}
    - {name: tenants, secret: {secretName: {{ $values.tenantsSecret.name }}}}
    {{- end }}
{{- end }}

{{- define "tailserve.env" -}}
{{- $values := .root.Values -}}
# How Ray Serve runs fastest for this job: cluster/settings.py has the reasons.
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
- {name: RAY_SERVE_LOG_TO_STDERR, value: "1"}
- {name: RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE, value: "1"}
- {name: RAY_SERVE_CONTROL_LOOP_INTERVAL_S, value: "0.5"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "2"}
- {name: RAY_SERVE_HAPROXY_NBTHREAD, value: "1"}
# A pod that is told to end lets its streams end first. Below terminationGracePeriodSeconds, and above Serve's own.
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ add $values.drainSeconds 30 | quote }}}
{{- if and $values.gcsFaultTolerance.backend (eq .kind "worker") }}
# Workers serve on while the head is away.
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "600"}
{{- end }}
- {name: HOME, value: /home/tailserve}
{{- if $values.modelCache.enabled }}
- {name: HF_HOME, value: /models/hub}
- {name: TAILSERVE_CACHE, value: /models/tailserve}
{{- else }}
- {name: HF_HOME, value: /home/tailserve/hub}
- {name: TAILSERVE_CACHE, value: /home/tailserve/cache}
{{- end }}
{{- with $values.hubTokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* By HTTP: those that KubeRay would inject need bash and wget, and their liveness never looks at Serve. */ -}}
{{- define "tailserve.probes" -}}
startupProbe:
  httpGet: {path: {{ eq .kind "head" | ternary "/api/gcs_healthz" "/api/local_raylet_healthz" }}, port: {{ eq .kind "head" | ternary 8265 52365 }}}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: {{ eq .kind "head" | ternary "/api/gcs_healthz" "/api/local_raylet_healthz" }}, port: {{ eq .kind "head" | ternary 8265 52365 }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if eq .kind "head" }}
  httpGet: {path: /api/gcs_healthz, port: 8265}
  {{- else }}
  # Unready while Serve's proxy drains, so that nobody is sent here any more.
  httpGet: {path: /-/healthz, port: 8000}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 1
{{- end }}
