/**
 * Hands a bus's numbers to prom-client. Without that package, serve {@link Bus.metrics}.
 *
 * @module
 */
import { type Bus, nativeOf } from './bus.js'
import { InvalidConfig } from './errors.js'

/** What is used of a `Registry` of prom-client. */
export interface MetricRegistry {
  registerMetric(metric: any): void
}

interface Sample {
  name: string
  labels: Record<string, string>
  value: number
}

interface Family {
  name: string
  type: string
  help: string
  samples: Sample[]
}

/** The buses of one registry: metrics of one name stand together, whichever bus they are from. */
class Collector {
  readonly buses = new Set<Bus<any>>()
  readonly #registry: MetricRegistry
  readonly #known = new Set<string>()
  #families: Map<string, Family> | undefined

  constructor(registry: MetricRegistry) {
    this.#registry = registry
  }

  /** The families of this moment: a scrape asks for all metrics in one go, and one reading serves them all. */
  families(): Map<string, Family> {
    if (this.#families !== undefined) return this.#families
    const families = new Map<string, Family>()
    this.#families = families
    queueMicrotask(() => {
      this.#families = undefined
    })
    for (const bus of this.buses) {
      for (const family of JSON.parse(nativeOf(bus).metricFamilies()) as Family[]) {
        const same = families.get(family.name)
        if (same === undefined) families.set(family.name, family)
        else same.samples.push(...family.samples)
      }
    }
    // A bus that has connected since has more to tell.
    for (const { name, type, help } of families.values()) this.#register(name, type, help)
    return families
  }

  #register(name: string, type: string, help: string): void {
    if (this.#known.has(name)) return
    this.#known.add(name)
    this.#registry.registerMetric({
      name,
      type,
      help,
      aggregator: 'sum',
      get: async () => {
        const samples = this.families().get(name)?.samples ?? []
        const values = samples.map((sample) => ({ ...sample, metricName: sample.name }))
        return { name, type, help, values, aggregator: 'sum' }
      },
      reset() {},
    })
  }
}

const collectors = new WeakMap<MetricRegistry, Collector>()

/**
 * Shows `bus` in a registry of prom-client: `registerMetrics(bus, promClient.register)`.
 *
 * Collecting waits for nothing; a bus that is not started shows what it has. Several buses are told apart by the labels
 * `service` and `bus`. A second call for one bus changes nothing.
 *
 * @returns a function that takes the bus out again.
 * @throws InvalidConfig when `registry` is none of prom-client's.
 */
export function registerMetrics(bus: Bus<any>, registry: MetricRegistry): () => void {
  if (typeof registry?.registerMetric !== 'function') {
    throw new InvalidConfig('registerMetrics(bus, registry): pass a Registry of prom-client, such as its `register`')
  }
  let collector = collectors.get(registry)
  if (collector === undefined) {
    collector = new Collector(registry)
    collectors.set(registry, collector)
  }
  const { buses } = collector
  buses.add(bus)
  collector.families()
  return () => {
    buses.delete(bus)
  }
}
