{{/* The table of services, read once per template. */}}
{{- define "octollm.table" -}}
{{- .Files.Get "files/services.yaml" -}}
{{- end -}}

{{- define "octollm.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a component: dict "root" $ "name" NAME. */}}
{{- define "octollm.selector" -}}
app.kubernetes.io/name: octollm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{- define "octollm.labels" -}}
{{ include "octollm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: octollm
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{/* What a service has: services.NAME over defaults, as YAML. */}}
{{- define "octollm.service" -}}
{{- $own := index .root.Values.services .name | default dict -}}
{{- toYaml (mergeOverwrite (deepCopy .root.Values.defaults) $own) -}}
{{- end -}}

{{- define "octollm.scheme" -}}
{{- if .Values.tls.secret }}https{{ else }}http{{ end -}}
{{- end -}}

{{/* The gateway's host names: those of the values, and those of its Service in the cluster. */}}
{{- define "octollm.hosts" -}}
{{- $own := printf "octollm.%s" .Release.Namespace -}}
{{- concat .Values.gateway.hosts (list "octollm" $own (printf "%s.svc" $own) (printf "%s.svc.cluster.local" $own)) | join "," -}}
{{- end -}}

{{- define "octollm.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "octollm.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The environment that every process has. */}}
{{- define "octollm.env" -}}
- name: OCTOLLM_KEYS
  value: /run/octollm/keys
- name: OCTOLLM_HOME
  value: /tmp/home
- name: OCTOLLM_STARTUP_TIMEOUT
  value: "120"
- name: OCTOLLM_SHUTDOWN_GRACE
  value: {{ .root.Values.shutdown.graceSeconds | quote }}
{{- if .root.Values.tls.secret }}
- name: OCTOLLM_TLS_CERT
  value: /run/octollm/tls/tls.crt
- name: OCTOLLM_TLS_KEY
  value: /run/octollm/tls/tls.key
- name: OCTOLLM_TLS_CA
  value: /run/octollm/tls/ca.crt
- name: OCTOLLM_MTLS
  value: {{ .root.Values.tls.mutual | ternary "on" "off" | quote }}
{{- end }}
{{- range $name, $value := .extra }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{- define "octollm.probes" -}}
{{- $get := dict "port" "http" "scheme" (include "octollm.scheme" .root | upper) -}}
{{- $mutual := .root.Values.tls.mutual -}}
{{- range $probe := list (dict "name" "startup" "path" "/health" "period" 5 "failures" 36) (dict "name" "readiness" "path" "/ready" "period" 5 "failures" 2) (dict "name" "liveness" "path" "/health" "period" 10 "failures" 6) }}
{{ $probe.name }}Probe:
{{- if $mutual }}
  tcpSocket:
    port: http
{{- else }}
  httpGet:
    path: {{ $probe.path }}
{{ toYaml $get | indent 4 }}
{{- end }}
  periodSeconds: {{ $probe.period }}
  timeoutSeconds: 4
  failureThreshold: {{ $probe.failures }}
{{- end }}
{{- end -}}

{{/* Endpoints of a pod leave DNS and load balancers before the service refuses calls. */}}
{{- define "octollm.lifecycle" -}}
preStop:
  exec:
    command: [sleep, {{ .Values.shutdown.preStopSeconds | toString | quote }}]
{{- end -}}

{{- define "octollm.spread" -}}
{{- range $key, $when := dict "kubernetes.io/hostname" "ScheduleAnyway" "topology.kubernetes.io/zone" "ScheduleAnyway" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: {{ $when }}
  labelSelector:
    matchLabels:
{{ include "octollm.selector" $ | indent 6 }}
{{- end }}
{{- end -}}
