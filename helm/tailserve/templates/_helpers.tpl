{{- define "tailserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- /* KubeRay adds a suffix to a RayService's name for its clusters, and takes 47 characters at most. */ -}}
{{- define "tailserve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "tailserve.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "tailserve.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Of the chart's own objects. Never of the pods: a changed pod template starts a new cluster. */ -}}
{{- define "tailserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/name: {{ include "tailserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /*
By which pods are found. KubeRay's pods carry no label of the RayService that stays the same from cluster to cluster, and
app.kubernetes.io/name is its own there: the head's Service selects by it.
*/ -}}
{{- define "tailserve.selector" -}}
tailserve/release: {{ .Release.Name }}
{{- end }}

{{- define "tailserve.metadata" -}}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "tailserve.labels" . | nindent 2 }}
{{- with .Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tailserve.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}
{{- end }}

{{- define "tailserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "tailserve.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "tailserve.priorityClassName" -}}
{{- if or .Values.priorityClass.create .Values.priorityClass.name }}
{{- default (include "tailserve.fullname" .) .Values.priorityClass.name }}
{{- end }}
{{- end }}

{{- define "tailserve.cacheClaim" -}}
{{- default (printf "%s-models" (include "tailserve.fullname" .)) .Values.modelCache.existingClaim }}
{{- end }}

{{- /*
The configuration of the application, with what the chart knows. Without the number of instances: Serve starts all of them
anew when an argument of the application changes.
*/ -}}
{{- define "tailserve.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if not $config.autoscaling }}
{{- $config = omit $config "num_instances" }}
{{- end }}
{{- $timeouts := default dict $config.timeouts }}
{{- if not (hasKey $timeouts "drain_s") }}
{{- $_ := set $config "timeouts" (merge (dict "drain_s" .Values.drainSeconds) $timeouts) }}
{{- end }}
{{- if .Values.tenantsSecret.name }}
{{- $_ := set $config "tenants_file" (printf "/etc/tailserve/tenants/%s" .Values.tenantsSecret.key) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- /* What the URL of the service is, inside the cluster. */ -}}
{{- define "tailserve.url" -}}
http://{{ include "tailserve.fullname" . }}-serve-svc.{{ .Release.Namespace }}.svc:{{ .Values.service.port }}
{{- end }}
