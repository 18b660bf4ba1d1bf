"""What a cluster, or a person at night, would object to and a schema does not see. A policy yields its complaints."""

import base64
import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit
from zoneinfo import available_timezones

import pika

from tests.manifests.rendering import EXAMPLE_SECRETS, K8S, Manifest, Manifests, Pod, job_spec, pod_template, read
from worker import cli
from worker.cli import COMMANDS, INVALID
from worker.cli.command_line import UsageError
from worker.core.lanes import CANCELLATION, LANES, SWEEP, sweep_cap
from worker.core.topology import Names
from worker.processes import MARGIN_SECONDS
from worker.service import LOOP_SILENT, MISCONFIGURED
from worker.settings import AmqpSettings, GatewaySettings, RetrySettings, SettingsGroup, WorkerSettings
from worker.wiring import PREFETCH_PER_SENDER

Complaints = Iterator[str]
Policy = Callable[[Manifests], Complaints]

CONFIRM_SECONDS: Final = 5.0
"""At least this much of a drain is for what comes after the last answer: confirms, acks, closing."""

RESTRICTED_VOLUMES: Final = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)
"""Pod Security Standards, restricted."""

POLICIES: Final[list[Policy]] = []


def policy(rule: Policy) -> Policy:
    POLICIES.append(rule)
    return rule


# -- names, labels, ports


_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
_PORT = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?\Z")


@policy
def names_are_dns_names(manifests: Manifests) -> Complaints:
    """RFC 1123; a CronJob adds 11 characters to its Jobs' names, and a port's name has at most 15."""
    for each in manifests.documents:
        name, kind = each["metadata"]["name"], each["kind"]
        rule = _LABEL if kind in ("Namespace", "Service", "CronJob") else _SUBDOMAIN
        if not rule.match(name) or (kind == "CronJob" and len(name) > 52):
            yield f"{kind} {name!r} cannot have this name"
    for pod in manifests.pods():
        for container in pod.containers():
            if not _LABEL.match(container["name"]):
                yield f"{pod.owner}: container {container['name']!r} cannot have this name"
            for port in container.get("ports", []):
                if not _PORT.match(port["name"]):
                    yield f"{pod.owner}: port {port['name']!r} cannot have this name"


@policy
def selectors_select(manifests: Manifests) -> Complaints:
    """Whatever selects pods selects one that is there; a Deployment its own, and its budget and spread the same."""
    pods = manifests.pods()
    for kind, name, selector in _selectors(manifests):
        if not any(selector.items() <= pod.labels.items() for pod in pods):
            yield f"{kind} {name} selects no pod: {selector}"
    for each in manifests.of("Deployment"):
        template, chosen = pod_template(each), each["spec"]["selector"]["matchLabels"]
        if not chosen.items() <= template["metadata"]["labels"].items():
            yield f"Deployment {each['metadata']['name']} does not select its own pods"
        for spread in template["spec"].get("topologySpreadConstraints", []):
            if spread["labelSelector"]["matchLabels"] != chosen:
                yield f"Deployment {each['metadata']['name']} spreads other pods than its own"
    for each in manifests.of("PodDisruptionBudget", "PodMonitor"):
        labels = each["spec"]["selector"]["matchLabels"]
        if manifests.of("Deployment") and labels not in [
            deployment["spec"]["selector"]["matchLabels"] for deployment in manifests.of("Deployment")
        ]:
            yield f"{each['kind']} {each['metadata']['name']} does not select what a Deployment does"


def _selectors(manifests: Manifests) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    if not manifests.pods():
        return  # the operator makes the pods
    for each in manifests.documents:
        spec, name = each.get("spec") or {}, each["metadata"]["name"]
        match each["kind"]:
            case "Service":
                yield each["kind"], name, spec["selector"]
            case "PodDisruptionBudget" | "PodMonitor":
                yield each["kind"], name, spec["selector"]["matchLabels"]
            case "NetworkPolicy" if spec["podSelector"]:
                yield each["kind"], name, spec["podSelector"]["matchLabels"]


@policy
def ports_exist(manifests: Manifests) -> Complaints:
    """A port is a port; probe, monitor, Service and policy find theirs; metrics are where they are served."""
    named: dict[str, int] = {}
    for pod in manifests.pods():
        for container in pod.containers():
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            named |= ports
            for name, number in ports.items():
                if not _is_port(number):
                    yield f"{pod.owner}: port {name} cannot be {number}"
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                asked = container.get(probe, {})
                wanted = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port")
                if isinstance(wanted, str) and wanted not in ports:
                    yield f"{pod.owner}: {probe} asks port {wanted!r}, which the container does not have"
    if not named:
        return
    for each in manifests.of("PodMonitor"):
        for endpoint in each["spec"]["podMetricsEndpoints"]:
            if endpoint.get("port") not in named:
                yield f"PodMonitor {each['metadata']['name']} scrapes port {endpoint.get('port')!r}, which no pod has"
    for name, port in [*_policy_ports(manifests), *_service_ports(manifests)]:
        if port not in named if isinstance(port, str) else not _is_port(port):
            yield f"{name} has port {port!r}, which no pod has, or nobody"
    if named.get("metrics") != int(manifests.settings()["METRICS_PORT"]):
        yield "the port named metrics is not METRICS_PORT"


def _is_port(number: int) -> bool:
    return 1 <= number <= 65535


def _policy_ports(manifests: Manifests) -> Iterator[tuple[str, Any]]:
    for each in manifests.of("NetworkPolicy"):
        for rule in [*each["spec"].get("ingress", []), *each["spec"].get("egress", [])]:
            for port in rule.get("ports", []):
                yield f"NetworkPolicy {each['metadata']['name']}", port["port"]


def _service_ports(manifests: Manifests) -> Iterator[tuple[str, Any]]:
    for each in manifests.of("Service"):
        for port in each["spec"]["ports"]:
            yield f"Service {each['metadata']['name']}", port["port"]
            yield f"Service {each['metadata']['name']}", port.get("targetPort", port["port"])


@policy
def probes_ask_what_is_served(manifests: Manifests) -> Complaints:
    """Start and life are asked for at /livez, readiness at /readyz; a kill comes after the worker would end itself."""
    for pod in manifests.pods():
        for container in pod.spec["containers"]:
            if container.get("args") != ["run"]:
                continue
            paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
            if paths != {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}:
                yield f"{pod.owner}: probes ask {paths}"
                continue
            alive = container["livenessProbe"]
            if alive["periodSeconds"] * alive["failureThreshold"] <= LOOP_SILENT:
                yield f"{pod.owner}: is killed before a loop counts as hung ({LOOP_SILENT:g} s)"


# -- pods


_UNITS: Final = {"": 1, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: object) -> float:
    """As ``256Mi``, in bytes or cores; not a number for what is none."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    return float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else math.nan


@policy
def resources_are_bounded(manifests: Manifests) -> Complaints:
    """Every container asks for CPU and memory, and may not take all memory; a request is within its limit."""
    for pod in manifests.pods():
        for container in pod.containers():
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            where = f"{pod.owner}: container {container['name']}"
            if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
                yield f"{where} lacks a request or its memory limit"
            for name, wanted in requests.items():
                if name in limits and not quantity(wanted) <= quantity(limits[name]):
                    yield f"{where} requests more {name} than its limit"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.owner}: volume {volume['name']} may fill the node"


@policy
def pods_are_restricted(manifests: Manifests) -> Complaints:
    """The restricted Pod Security Standard, and a namespace that enforces it, and a root that is read-only."""
    for pod in manifests.pods():
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.owner}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner}: has no seccomp profile"
        if any(pod.spec.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.owner}: shares the host's namespaces"
        for volume in pod.spec.get("volumes", []):
            if not volume.keys() - {"name"} <= RESTRICTED_VOLUMES:
                yield f"{pod.owner}: volume {volume['name']} is of a kind that is not allowed"
        for container in pod.containers():
            own = container.get("securityContext", {})
            if (
                own.get("allowPrivilegeEscalation") is not False
                or own.get("readOnlyRootFilesystem") is not True
                or own.get("capabilities") != {"drop": ["ALL"]}
                or own.get("privileged")
                or own.get("runAsUser") == 0
                or any("hostPort" in port for port in container.get("ports", []))
            ):
                yield f"{pod.owner}: container {container['name']} is not confined"
    for each in manifests.of("Namespace"):
        wanted = "restricted" if manifests.pods() else "baseline"
        if each["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != wanted:
            yield f"Namespace {each['metadata']['name']} does not enforce {wanted}"


@policy
def pods_get_no_more_than_they_need(manifests: Manifests) -> Complaints:
    """No token, no variables of Services, secrets as whole mounted directories, never in the environment."""
    for pod in manifests.pods():
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: gets a token"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.owner}: gets variables of Services"
        for container in pod.containers():
            where = f"{pod.owner}: container {container['name']}"
            if any("secretRef" in source for source in container.get("envFrom", [])) or any(
                "secretKeyRef" in variable.get("valueFrom", {}) for variable in container.get("env", [])
            ):
                yield f"{where} has a secret in its environment"
            if any("subPath" in mount for mount in container.get("volumeMounts", [])):
                yield f"{where} mounts a subPath, which never changes"
    for each in manifests.of("ServiceAccount"):
        if each.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {each['metadata']['name']} gives a token"


@policy
def images_are_pinned(manifests: Manifests) -> Complaints:
    """Each image has a tag other than latest, or a digest."""
    for pod in manifests.pods():
        for container in pod.containers():
            name, _, digest = container["image"].partition("@")
            tag = name.rpartition("/")[2].partition(":")[2]
            if not digest and tag in ("", "latest"):
                yield f"{pod.owner}: image {container['image']} may be another tomorrow"


@policy
def references_exist(manifests: Manifests) -> Complaints:
    """ConfigMaps, claims and accounts are rendered; Secrets are rendered or in the example; volumes are mounted."""
    there = {
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in manifests.documents
    }
    for pod in manifests.pods():
        for kind, name in _references(pod.spec):
            known = (
                manifests.secret_keys(pod.namespace, name) if kind == "Secret" else (kind, pod.namespace, name) in there
            )
            if not known:
                yield f"{pod.owner}: {kind} {name} is nowhere"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        mounted = {mount["name"] for each in pod.containers() for mount in each.get("volumeMounts", [])}
        for name in volumes ^ mounted:
            yield f"{pod.owner}: volume {name} is not defined, or not mounted"
    for each in manifests.of("TriggerAuthentication"):
        for entry in each["spec"]["secretTargetRef"]:
            if entry["key"] not in manifests.secret_keys(each["metadata"]["namespace"], entry["name"]):
                yield f"TriggerAuthentication: Secret {entry['name']} has no key {entry['key']}"
    for each in manifests.of("RabbitmqCluster", "User"):
        spec = each["spec"]
        name = spec["tls"]["secretName"] if "tls" in spec else spec["importCredentialsSecret"]["name"]
        wanted = {"tls.crt", "tls.key"} if "tls" in spec else {"username", "password"}
        if not wanted <= manifests.secret_keys(each["metadata"]["namespace"], name):
            yield f"{each['kind']} {each['metadata']['name']}: Secret {name} lacks a key of {sorted(wanted)}"


def _references(spec: Manifest) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in spec:
        yield "ServiceAccount", spec["serviceAccountName"]
    for volume in spec.get("volumes", []):
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                yield "ConfigMap", source["configMapRef"]["name"]


# -- what the worker understands


@policy
def arguments_are_the_command_line_s(manifests: Manifests) -> Complaints:
    """The real command line takes the arguments of every container of ours."""
    for pod in manifests.pods():
        for container in pod.containers():
            arguments = [str(each).replace("$(JOB_NAME)", "sweep-29") for each in container.get("args", [])]
            if not arguments or arguments[0] not in COMMANDS:
                if "qris-expire-worker" in container["image"] and "command" not in container:
                    yield f"{pod.owner}: container {container['name']} calls no command: {arguments}"
                continue
            problem = _refusal(arguments)
            if problem:
                yield f"{pod.owner}: container {container['name']}: {problem}"


def _refusal(arguments: list[str]) -> str:
    try:
        cli.read(arguments)
    except UsageError as error:
        return str(error)
    return ""


@policy
def secret_settings_are_mounted(manifests: Manifests) -> Complaints:
    """Each setting that is a path leads into a mounted Secret that has this key (or to where the simulator writes)."""
    for pod in manifests.pods():
        for container in pod.ours():
            # Where people call our commands themselves, those that speak to the broker must find their files.
            command = container.get("args", ["status"])[0]
            for variable, value in manifests.settings().items():
                if not variable.endswith("_FILE") or not value or not variable.startswith(COMMANDS[command]):
                    continue
                if not _mounted(manifests, pod, container, PurePosixPath(value)):
                    yield f"{pod.owner}: {variable}={value} is no key of a mounted Secret"


def _mounted(manifests: Manifests, pod: Pod, container: Manifest, path: PurePosixPath) -> bool:
    for mount in container.get("volumeMounts", []):
        if PurePosixPath(mount["mountPath"]) == path.parent:
            (volume,) = (each for each in pod.spec["volumes"] if each["name"] == mount["name"])
            if "secret" not in volume:
                return path.name == "simulator-key.pem"
            return path.name in manifests.secret_keys(pod.namespace, volume["secret"]["secretName"])
    return False


def setting(manifests: Manifests, group: type[SettingsGroup], name: str) -> Any:
    """A setting as the worker would have it, default included; those that are secrets or files aside."""
    value = manifests.settings().get(group.variable(name), "")
    field = group.declared()[name]
    return field.default if value == "" else type(field.default)(value)


@policy
def drain_fits(manifests: Manifests) -> Complaints:
    """Longest call and its confirm < drain; drain, the parent's margin and some air < what Kubernetes waits."""
    for pod in manifests.pods():
        if not any(container.get("args") == ["run"] for container in pod.containers()):
            continue
        call = sum(setting(manifests, GatewaySettings, f"{part}_timeout_seconds") for part in ("connect", "read"))
        drain = setting(manifests, WorkerSettings, "drain_seconds")
        if drain < call + CONFIRM_SECONDS:
            yield f"{pod.owner}: a call takes up to {call:g} s, a drain only {drain:g} s"
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if grace < drain + MARGIN_SECONDS + CONFIRM_SECONDS:
            yield f"{pod.owner}: is killed after {grace} s, in a drain of {drain:g} s"


# -- scaling


@policy
def replicas_have_one_master(manifests: Manifests) -> Complaints:
    """A Deployment has replicas, or a ScaledObject that sets them, never both."""
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in manifests.of("ScaledObject")}
    deployments = {each["metadata"]["name"]: each for each in manifests.of("Deployment")}
    for name in scaled - deployments.keys():
        yield f"a ScaledObject scales {name}, which is no Deployment"
    for name, each in deployments.items():
        if (name in scaled) == ("replicas" in each["spec"]):
            yield f"Deployment {name}: replicas by {'two masters' if name in scaled else 'nobody'}"


@policy
def scaling_counts_the_lanes(manifests: Manifests) -> Complaints:
    """Each lane has a trigger that asks the management API for ready and unacked commands, in the worker's vhost."""
    for each in manifests.of("ScaledObject"):
        prefix = setting(manifests, AmqpSettings, "prefix")
        asked = {trigger["metadata"]["queueName"] for trigger in each["spec"]["triggers"]}
        if asked != {Names(prefix).queue(lane) for lane in LANES}:
            yield f"ScaledObject asks for {sorted(asked)}, not for the lanes"
        known = {other["metadata"]["name"] for other in manifests.of("TriggerAuthentication")}
        for trigger in each["spec"]["triggers"]:
            it = trigger["metadata"]
            if it.get("protocol") != "http" or it.get("excludeUnacknowledged", "false") != "false":
                yield f"{it['queueName']}: commands in hand do not count"
            if it.get("vhostName") != pika.URLParameters(broker_url(manifests)).virtual_host:
                yield f"{it['queueName']}: is looked for in another vhost than the worker's"
            if trigger.get("authenticationRef", {}).get("name") not in known:
                yield f"{it['queueName']}: nobody to log in as"


@policy
def scaling_respects_prefetch_and_partner(manifests: Manifests) -> Complaints:
    """One pod's prefetch alone asks for no second pod; the fleet stays within the partner's rate; never no pod."""
    for each in manifests.of("ScaledObject"):
        concurrency = setting(manifests, WorkerSettings, "concurrency")
        senders = {
            CANCELLATION: concurrency,
            SWEEP: sweep_cap(concurrency, setting(manifests, WorkerSettings, "sweep_share")),
        }
        processes = setting(manifests, WorkerSettings, "processes")
        for trigger in each["spec"]["triggers"]:
            lane = trigger["metadata"]["queueName"].rpartition(".")[2]
            prefetch = PREFETCH_PER_SENDER[lane] * senders.get(lane, 0) * processes
            if float(trigger["metadata"]["value"]) <= prefetch:
                yield f"{lane}: the {prefetch} that one pod holds ask for another pod"
        target = manifests.one("Deployment", each["spec"]["scaleTargetRef"]["name"])
        rate = setting(manifests, GatewaySettings, "max_requests_per_second")
        allowed = float(target["metadata"]["annotations"]["qris-expire/partner-requests-per-second"])
        if not 0 < rate <= allowed:
            yield f"the fleet sends {rate:g} a second (0: without limit); the partner allows {allowed:g}"
        if each["spec"].get("minReplicaCount", 0) < 2:
            yield "with fewer than 2 pods a cancellation waits for one to start or to move"


def broker_url(manifests: Manifests) -> str:
    """What the worker's Secret holds, rendered or in the example."""
    if manifests.of("Secret"):
        return base64.b64decode(manifests.one("Secret", "qris-expire-broker")["data"]["amqp-url"]).decode()
    (example,) = (each for each in manifests.secrets if each["metadata"]["name"] == "qris-expire-broker")
    return str(example["stringData"]["amqp-url"])


# -- jobs


_FIELDS: Final = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 6))


def cron_problem(schedule: str) -> str:
    """What is wrong with five fields of numbers, ranges, lists and steps; empty if nothing is."""
    fields = schedule.split()
    if len(fields) != len(_FIELDS):
        return f"{schedule!r} has {len(fields)} fields"
    for text, (name, low, high) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
            numbers = [int(number) for number in found.groups()[:2] if number] if found else [-1]
            if not all(low <= number <= high for number in numbers) or sorted(numbers) != numbers:
                return f"{name} cannot be {part!r}"
    return ""


@policy
def jobs_end(manifests: Manifests) -> Complaints:
    """A Job never restarts a container, tries a bounded number of times, ends by a deadline and is cleared away."""
    for each in manifests.of("CronJob", "Job"):
        job, name = job_spec(each), each["metadata"]["name"]
        if job["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{name}: a podFailurePolicy needs restartPolicy Never"
        for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
            if not job.get(field):
                yield f"{name}: has no {field}"


@policy
def jobs_know_our_exit_codes(manifests: Manifests) -> Complaints:
    """Wrong settings or input (2) end a Job at once; a moved pod costs no try."""
    assert INVALID == MISCONFIGURED == 2
    for each in manifests.of("CronJob", "Job"):
        job, name = job_spec(each), each["metadata"]["name"]
        containers = {container["name"] for container in job["template"]["spec"]["containers"]}
        rules = job.get("podFailurePolicy", {}).get("rules", [])
        codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule and rule["action"] == "FailJob"]
        if not any(INVALID in code["values"] and code["operator"] == "In" for code in codes):
            yield f"{name}: goes on after exit code {INVALID}"
        if any(code.get("containerName") not in containers or 0 in code["values"] for code in codes):
            yield f"{name}: a rule is about a container or a code that cannot be"
        moved = [condition for rule in rules if rule["action"] == "Ignore" for condition in rule["onPodConditions"]]
        if {"type": "DisruptionTarget", "status": "True"} not in moved:
            yield f"{name}: a moved pod counts as a failure"


@policy
def sweeps_come_once_a_day(manifests: Manifests) -> Complaints:
    """A valid schedule in Jakarta's time, one at a time, missed by a bounded time, over before the next one."""
    for each in manifests.of("CronJob"):
        spec, name = each["spec"], each["metadata"]["name"]
        problem = cron_problem(spec["schedule"])
        if problem:
            yield f"{name}: {problem}"
        if spec.get("timeZone") != "Asia/Jakarta" or spec["timeZone"] not in available_timezones():
            yield f"{name}: the day ends in Asia/Jakarta"
        if spec.get("concurrencyPolicy") != "Forbid":
            yield f"{name}: two could run at a time"
        late = spec.get("startingDeadlineSeconds")
        if not late or late + job_spec(each).get("activeDeadlineSeconds", 0) >= 86_400:
            yield f"{name}: could run into the next day's, or never again"


@policy
def sweeps_keep_their_journal(manifests: Manifests) -> Complaints:
    """Input, journal and report outlive the pod, under the Job's name: a second pod goes on with the same batch."""
    for pod in manifests.pods():
        for container in pod.containers():
            arguments = container.get("args", [])
            if arguments[:1] != ["sweep"]:
                continue
            claims = {volume["name"] for volume in pod.spec["volumes"] if "persistentVolumeClaim" in volume}
            kept = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in claims]
            paths = [arguments[1], *(each.partition("=")[2] for each in arguments if each.startswith("--report="))]
            if not kept or not all(path.startswith(f"{kept[0]}/$(JOB_NAME).") for path in paths):
                yield f"{pod.owner}: input or report goes with the pod"
            if "--batch-id=$(JOB_NAME)" not in arguments or "--wait" not in arguments:
                yield f"{pod.owner}: a second pod would begin another batch, or nobody follows it"
            if kept != ["/var/lib/qris-expire"]:  # the image's XDG_STATE_HOME is /var/lib
                yield f"{pod.owner}: the journal goes with the pod"
            sources = [each for each in container.get("env", []) if each["name"] == "JOB_NAME"]
            path = "metadata.labels['batch.kubernetes.io/job-name']"
            if [each["valueFrom"]["fieldRef"]["fieldPath"] for each in sources] != [path]:
                yield f"{pod.owner}: JOB_NAME is not the Job's name"


# -- network


@policy
def network_is_closed(manifests: Manifests) -> Complaints:
    """Everything is denied first; nobody reaches the cloud's metadata; in comes only who scrapes."""
    policies = manifests.of("NetworkPolicy")
    if not policies:
        return  # dev
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if not any(each["spec"] == closed for each in policies):
        yield "nothing denies by default"
    for each in policies:
        name, spec = each["metadata"]["name"], each["spec"]
        for rule in spec.get("egress", []):
            if not rule.get("to") or not rule.get("ports"):
                yield f"{name}: goes anywhere"
            for block in (to["ipBlock"] for to in rule.get("to", []) if "ipBlock" in to):
                if _reaches(block, "169.254.169.254"):
                    yield f"{name}: reaches the metadata service"
        for rule in spec.get("ingress", []):
            if not rule.get("from") or [port["port"] for port in rule.get("ports", [])] != ["metrics"]:
                yield f"{name}: lets in more than a scrape"


def _reaches(block: Manifest, address: str) -> bool:
    it = ipaddress.ip_address(address)
    return it in ipaddress.ip_network(block["cidr"]) and not any(
        it in ipaddress.ip_network(cidr) for cidr in block.get("except", [])
    )


@policy
def network_lets_the_worker_work(manifests: Manifests) -> Complaints:
    """DNS, the broker's port and the gateway's port are open for the worker."""
    if not manifests.of("NetworkPolicy"):
        return
    (worker,) = (pod for pod in manifests.pods() if pod.labels.get("app.kubernetes.io/component") == "worker")
    open_ports = {
        port["port"]
        for each in manifests.of("NetworkPolicy")
        if each["spec"]["podSelector"].get("matchLabels", {}).items() <= worker.labels.items()
        for rule in each["spec"].get("egress", [])
        for port in rule["ports"]
    }
    gateway = urlsplit(manifests.settings()["GATEWAY_BASE_URL"])
    needed = {53, pika.URLParameters(broker_url(manifests)).port, gateway.port or 443}
    if not needed <= open_ports:
        yield f"the worker cannot reach ports {sorted(needed - open_ports)}"


# -- broker


@policy
def deleting_resources_loses_nothing(manifests: Manifests) -> Complaints:
    """Queues outlive their resources, and every resource names the cluster that is there."""
    clusters = {each["metadata"]["name"] for each in manifests.of("RabbitmqCluster")}
    for each in manifests.of("Queue", "Exchange", "Binding", "User", "Permission", "Policy"):
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Queue" and each["spec"].get("deletionPolicy") != "retain":
            yield f"{where}: deleting it deletes its messages"
        if each["spec"]["rabbitmqClusterReference"]["name"] not in clusters:
            yield f"{where}: no such cluster"
    users = {each["metadata"]["name"] for each in manifests.of("User")}
    for each in manifests.of("Permission"):
        if each["spec"]["userReference"]["name"] not in users:
            yield f"Permission {each['metadata']['name']}: no such user"


@policy
def delays_have_their_queue(manifests: Manifests) -> Complaints:
    """With AMQP_DECLARE=false every delay of RETRY_DELAYS_SECONDS has its queue among the broker's resources."""
    if not manifests.of("ConfigMap") or manifests.settings().get("AMQP_DECLARE") != "false":
        return
    names = Names(setting(manifests, AmqpSettings, "prefix"))
    written = manifests.settings().get("RETRY_DELAYS_SECONDS", "")
    default = RetrySettings.declared()["delays_seconds"].default
    delays = [int(text) for text in written.split(",")] if written else default
    there = {
        each["spec"]["name"] for each in read((K8S / "broker" / "topology.yaml").read_text()) if each["kind"] == "Queue"
    }
    for queue in (names.retry(lane, seconds) for lane in LANES for seconds in delays):
        if queue not in there:
            yield f"queue {queue} is not in k8s/broker/topology.yaml"


@policy
def example_holds_no_secret(manifests: Manifests) -> Complaints:
    """What must be secret is FILL-IN in the example, and no Secret of it is rendered with real values."""
    open_keys = {"username", "tls"}
    for each in read(EXAMPLE_SECRETS.read_text()):
        for key, value in each["stringData"].items():
            if key not in open_keys and "FILL-IN" not in value:
                yield f"{each['metadata']['name']}: {key} is filled in"
    if manifests.of("ScaledObject") and manifests.of("Secret"):
        yield "production renders a Secret"
