/* What the web server shows: /cgi-bin/status (JSON, for tests) and / (a page, for people). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define KLOG_READ_ALL 3
#define KLOG_WARNING 4

static void put_json_string(const char *text)
{
	putchar('"');
	for (; *text; text++)
		if (*text == '"' || *text == '\\')
			printf("\\%c", *text);
		else if ((unsigned char)*text < ' ')
			putchar(' ');
		else
			putchar(*text);
	putchar('"');
}

/* Counts the kernel's messages of level warning or worse, and keeps the last one. */
static int kernel_warnings(char *last, size_t size)
{
	static char log[1 << 18];
	char *line, *rest = log;
	int count = 0, length = klogctl(KLOG_READ_ALL, log, sizeof log - 1);

	*last = 0;
	log[length > 0 ? length : 0] = 0;
	while ((line = strsep(&rest, "\n"))) {
		int priority;

		if (sscanf(line, "<%d>", &priority) == 1 && priority >> 3 == 0 && (priority & 7) <= KLOG_WARNING) {
			count++;
			snprintf(last, size, "%s", strchr(line, '>') + 1);
		}
	}
	return count;
}

int status_main(void)
{
	static char worker[8192];
	char source[64], load[64], warning[400];
	int warnings = kernel_warnings(warning, sizeof warning);
	struct utsname kernel;
	struct sysinfo info;

	uname(&kernel);
	sysinfo(&info);
	slurp("/sys/devices/system/clocksource/clocksource0/current_clocksource", source, sizeof source);
	slurp("/proc/loadavg", load, sizeof load);
	slurp(WORKER_STATUS, worker, sizeof worker);
	printf("Content-Type: application/json\r\nCache-Control: no-store\r\n\r\n");
	printf("{\"realtime_ns\":%lld,\"monotonic_ns\":%lld,\"boottime_ns\":%lld,\"uptime_s\":%.3f,\"clocksource\":",
	       (long long)now_ns(CLOCK_REALTIME), (long long)now_ns(CLOCK_MONOTONIC),
	       (long long)now_ns(CLOCK_BOOTTIME), now_ns(CLOCK_BOOTTIME) / 1e9);
	put_json_string(source);
	printf(",\"kernel\":");
	put_json_string(kernel.release);
	printf(",\"cpus\":%ld,\"mem_kb\":%lu,\"mem_free_kb\":%lu,\"processes\":%d,\"loadavg\":",
	       sysconf(_SC_NPROCESSORS_ONLN), info.totalram * info.mem_unit / 1024,
	       info.freeram * info.mem_unit / 1024, info.procs);
	put_json_string(load);
	printf(",\"kernel_warnings\":%d,\"last_kernel_warning\":", warnings);
	put_json_string(warning);
	printf(",\"worker\":%s}\n", *worker ? worker : "null");
	return 0;
}

int index_main(void)
{
	struct utsname kernel;
	time_t now = time(NULL);
	double up = now_ns(CLOCK_BOOTTIME) / 1e9;

	uname(&kernel);
	printf("Content-Type: text/html; charset=utf-8\r\nCache-Control: no-store\r\n\r\n");
	printf("<!doctype html><title>microvm guest</title><h1>A guest of microvm</h1>\n"
	       "<p>Linux %s, %ld CPUs, up %.1f s\n<p>%s"
	       "<p><a href=\"/cgi-bin/status\">status</a>\n", kernel.release, sysconf(_SC_NPROCESSORS_ONLN), up,
	       asctime(gmtime(&now)));
	return 0;
}
